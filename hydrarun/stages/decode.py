"""Latents to pixels."""

from __future__ import annotations

import torch

from hydrarun.errors import RunError
from hydrarun.pipeline import Parts, Stage
from hydrarun.state import State
from hydrarun.timing import Timings


class DecodeLatents(Stage):
    """Unpacks the latents, undoes the VAE's normalisation and decodes them to 8-bit pictures."""

    needs = ("latents", "height", "width")
    gives = ("images",)
    phase = "decode"

    def __call__(self, state: State, parts: Parts, timings: Timings) -> None:
        pipeline = parts.pipeline
        latents = pipeline._unpack_latents(state.latents, state.height, state.width, pipeline.vae_scale_factor)
        latents = denormalise(latents.to(pipeline.vae.dtype), pipeline.vae.config)
        frames = pipeline.vae.decode(latents, return_dict=False)[0][:, :, 0]
        if not frames.isfinite().all():
            raise RunError("the VAE decoded NaN or infinity: try dtype=float32, or check the vae's weights")
        images = pipeline.image_processor.postprocess(frames, output_type="np")
        state.images = (images * 255).round().astype("uint8")


def denormalise(latents: torch.Tensor, config: dict) -> torch.Tensor:
    """`[N, C, F, H, W]` from zero mean and unit deviation back to the VAE's own, channel by channel."""
    # the reference divides by 1 / std: multiplying by std would round differently
    inverse = 1.0 / torch.tensor(config["latents_std"]).view(1, -1, 1, 1, 1).to(latents.device, latents.dtype)
    mean = torch.tensor(config["latents_mean"]).view(1, -1, 1, 1, 1).to(latents.device, latents.dtype)
    return latents / inverse + mean
