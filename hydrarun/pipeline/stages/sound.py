"""Sound: noise of the transformer's fixed length, and the requested part of the sound as samples."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from hydrarun.config.checks.checkpoint import max_sound_seconds
from hydrarun.core.errors import RunError
from hydrarun.core.timing import Timings
from hydrarun.pipeline.stage import Components, Stage
from hydrarun.pipeline.stages.latents import make_generators
from hydrarun.pipeline.state import State

# schedulers query their noise up to the ends of its interval, which rounding moves, and at 0, outside of it
warnings.filterwarnings("ignore", r"Should have t[ab][<>]=t[01]", module="torchsde")

#: the largest 16-bit sample
FULL_SCALE = 32767


class PrepareSoundLatents(Stage):
    """Draws each item's noise from its own CPU generator, like `PrepareLatents`, times the scheduler's initial sigma.

    The latents are `[N, C, L]`, where L is the transformer's own length, whatever part of the sound is requested.
    """

    needs = ("seeds",)
    gives = ("latents", "grid", "generators")
    phase = "encode"

    def __call__(self, state: State, parts: Components, timings: Timings) -> None:
        config: Any = parts.experts.config
        state.generators = make_generators(state.seeds)
        shape = (1, config["in_channels"], config["sample_size"])
        noise = torch.cat([torch.randn(shape, generator=one, dtype=parts.dtype) for one in state.generators])
        state.latents = noise.to(parts.device) * parts.pipeline.scheduler.init_noise_sigma
        state.grid = (1, 1, config["sample_size"])


class DecodeSound(Stage):
    """Decodes the latents and keeps the requested seconds, as 16-bit samples.

    Samples beyond full scale are clipped, as in any 16-bit file, and the user gets a note.
    """

    needs = ("latents", "audio_start_in_s", "audio_end_in_s")
    gives = ("frames",)
    phase = "decode"
    uses = ("vae",)

    def __call__(self, state: State, parts: Components, timings: Timings) -> None:
        vae = parts.pipeline.vae
        sound = vae.decode(state.latents.to(vae.device, vae.dtype)).sample  # [N, channels, samples]
        if not sound.isfinite().all():
            raise RunError("the VAE decoded NaN or infinity: try vae.dtype=float32, or check the vae's weights")
        first, stop = (int(second * vae.config.sampling_rate) for second in find_sound_span(state, parts))
        kept = sound[:, :, first:stop].float()
        beyond = int((kept.abs() > 1).sum())
        if beyond:
            parts.progress.note(f"cut off at full scale: {100 * beyond / kept.numel():.2g} % of the samples")
        samples = (kept.clamp(-1, 1) * FULL_SCALE).round().to(torch.int16)
        state.frames = samples.transpose(1, 2).contiguous().cpu().numpy()


def find_sound_span(state: State, parts: Components) -> tuple[float, float]:
    """Return the start and end of the sound in seconds; by default the whole sound that the model makes."""
    end = state.audio_end_in_s
    return state.audio_start_in_s or 0.0, max_sound_seconds(
        parts.pipeline.vae.config, parts.experts.config
    ) if end is None else end
