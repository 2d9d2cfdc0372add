"""Pictures in layers: each layer is a frame of the latents, after a first frame with the whole picture."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from hydrarun.pipeline.stages.decode import DecodeLatents
from hydrarun.pipeline.stages.latents import PrepareLatents
from hydrarun.pipeline.state import State


class PrepareLayers(PrepareLatents):
    """Draws the noise of the first frame and of every layer, one after the other, in the reference's order."""

    needs = (*PrepareLatents.needs, "layers")

    def frames(self, state: State, per_frame: int) -> int:
        assert state.layers is not None  # checked: the model takes the field
        return state.layers + 1

    def noise(self, shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        one, channels, frames, *sides = shape
        return super().noise((one, frames, channels, *sides), generator, dtype).transpose(1, 2)


class DecodeLayers(DecodeLatents):
    """Decodes every layer as a separate picture, without the first frame: `[N, L, H, W, 4]`."""

    def decode(self, latents: Tensor, pipeline: Any) -> np.ndarray:
        layers = latents[:, :, 1:].transpose(1, 2)  # [N, L, C, h, w]
        drawn = super().decode(layers.flatten(0, 1).unsqueeze(2), pipeline)
        return drawn.reshape(*layers.shape[:2], *drawn.shape[2:])
