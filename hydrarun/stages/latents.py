"""Noise to start from."""

from __future__ import annotations

import torch

from hydrarun.fit import PATCH
from hydrarun.pipeline import Parts, Stage
from hydrarun.state import State
from hydrarun.timing import Timings


class PrepareLatents(Stage):
    """Draws each item's noise from its own CPU generator, with the pipeline's own shape, order and packing.

    The same seed then gives the same noise on every device, in every batch, and in diffusers.
    """

    needs = ("seeds", "height", "width")
    gives = ("latents", "grid")
    phase = "encode"

    def __call__(self, state: State, parts: Parts, timings: Timings) -> None:
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in state.seeds]
        state.latents = parts.pipeline.prepare_latents(
            len(state.seeds),
            parts.transformer.config["in_channels"] // PATCH**2,
            state.height,
            state.width,
            parts.dtype,
            parts.device,
            generators,
        )
        token = parts.pipeline.vae_scale_factor * PATCH
        state.grid = (1, state.height // token, state.width // token)
