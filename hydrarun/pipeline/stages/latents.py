"""Draws the initial noise."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hydrarun.config.checks.checkpoint import read_vae_factors
from hydrarun.core.timing import Timings
from hydrarun.models.layers.patchify import pack_latents
from hydrarun.pipeline import vae
from hydrarun.pipeline.stage import Components, Stage
from hydrarun.pipeline.state import State


class PrepareLatents(Stage):
    """Draws each item's noise from its own CPU generator, in the reference's order and dtype.

    The same seed then gives the same noise on every device, in every batch, and in diffusers. `packed`: whether the
    transformer takes tokens of patches. `keep_float32`: whether the latents stay float32 between the steps, whatever
    dtype the transformer computes in. Both follow the reference.
    """

    needs: tuple[str, ...] = ("seeds", "height", "width", "num_frames")
    gives = ("latents", "grid", "generators")
    phase = "encode"

    def __init__(self, packed: bool = True, keep_float32: bool = False) -> None:
        self.packed = packed
        self.keep_float32 = keep_float32

    def __call__(self, state: State, parts: Components, timings: Timings) -> None:
        per_frame, side = read_vae_factors(parts.pipeline.vae.config)
        assert side is not None
        frames = self.frames(state, per_frame or 1)
        shape = (1, vae.count_latent_channels(parts.pipeline), frames, state.height // side, state.width // side)
        dtype = torch.float32 if self.keep_float32 else parts.dtype
        state.generators = make_generators(state.seeds)
        noise = [self.noise(shape, generator, dtype) for generator in state.generators]
        latents = torch.cat(noise).to(parts.device)
        state.latents = pack_latents(latents, parts.patch_size) if self.packed else latents
        state.grid = (frames, shape[3] // parts.patch_size, shape[4] // parts.patch_size)

    def frames(self, state: State, per_frame: int) -> int:
        """Return the number of latent frames: one for the first video frame, one for each `per_frame` after it."""
        return 1 if state.num_frames is None else (state.num_frames - 1) // per_frame + 1

    def noise(self, shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> torch.Tensor:
        """Draw one item's noise, `[1, C, F, h, w]`."""
        return torch.randn(shape, generator=generator, dtype=dtype)


def make_generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """Return one CPU generator for each seed."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]
