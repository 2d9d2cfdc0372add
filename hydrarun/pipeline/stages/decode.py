"""Decodes latents to pixels."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from hydrarun.core.timing import Timings
from hydrarun.models.layers.patchify import unpack_latents
from hydrarun.pipeline import vae
from hydrarun.pipeline.stage import Components, Stage
from hydrarun.pipeline.state import State


class DecodeLatents(Stage):
    """Unpacks the latents, undoes the VAE's normalisation and decodes them to 8-bit pictures or frames."""

    needs = ("latents", "grid")
    gives = ("frames",)
    phase = "decode"
    uses = ("vae",)

    def __call__(self, state: State, parts: Components, timings: Timings) -> None:
        latents = state.latents
        if latents.ndim == 3:
            latents = unpack_latents(latents, state.grid, parts.patch_size)
        state.frames = self.decode(latents, parts.pipeline)

    def decode(self, latents: Tensor, pipeline: Any) -> np.ndarray:
        """Decode latents `[N, C, f, h, w]` to frames, uint8 `[N, F, H, W, 3]`."""
        pixels = vae.decode_latents(pipeline, latents).transpose(1, 2)  # [N, F, 3, H, W]
        processor = pipeline.video_processor if hasattr(pipeline, "video_processor") else pipeline.image_processor
        images = processor.postprocess(pixels.flatten(0, 1), output_type="np")  # [N * F, H, W, 3], 0 to 1
        return (images * 255).round().astype("uint8").reshape(*pixels.shape[:2], *images.shape[1:])
