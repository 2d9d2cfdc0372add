"""Guidance: which branches a step predicts, and how the predictions are combined."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from hydrarun.models.transformer import FEWER_BLOCKS, NEGATIVE, POSITIVE
from hydrarun.pipeline.state import State

Scale = Literal["true_cfg_scale", "guidance_scale", "guidance_scale_2"]


class ClassifierFreeGuidance:
    """Classifier-free guidance (https://arxiv.org/abs/2207.12598) with a negative prompt.

    `scale`: the field of `sampling` that holds the scale. `scale_2`: the field with the scale of the low-noise expert
    (a null value in it: the same scale).
    `rescale_norm` scales each token of the guided prediction to the norm of the positive one, which prevents
    oversaturation at high scales; `down`: only where the guided norm is larger. Set it as the model's reference does.
    `unguided`: the scale that means no guidance: 1, or 0 for models whose reference counts from 0.
    `cfg_normalization` caps the norm of an item's guided prediction at this multiple of the positive one's (null: no
    cap). `cfg_truncation`: guidance is off after this share of the way from noise to picture.
    `unprompted`: the conditioning input that is zeros in the negative branch if there is no negative prompt (null: a
    negative prompt is required).
    """

    def __init__(
        self,
        scale: Scale = "true_cfg_scale",
        scale_2: Scale | None = None,
        rescale_norm: bool | Literal["down"] = False,
        unguided: float = 1.0,
        cfg_normalization: float | None = None,
        cfg_truncation: float = 1.0,
        unprompted: str | None = None,
    ) -> None:
        self.layers: tuple[int, ...] = ()  # the blocks that FEWER_BLOCKS leaves out
        self.scale = scale
        self.scale_2 = scale_2
        self.rescale_norm = rescale_norm
        self.unguided = unguided
        self.cfg_normalization = cfg_normalization
        self.cfg_truncation = cfg_truncation
        self.unprompted = unprompted

    def branches(self, state: State) -> tuple[str, ...]:
        """Return the branches of a request's steps, in the reference's order; one for scales up to `unguided`.

        As in the reference, the first expert's scale decides for both experts.
        """
        return (POSITIVE, NEGATIVE) if self.scale_for(state, low_noise=False) > self.unguided else (POSITIVE,)

    def branches_at(self, state: State, index: int) -> tuple[str, ...]:
        """Return the predictions of the step `index`: the branches, and FEWER_BLOCKS in steps that use it."""
        return self.branches(state)

    def scale_for(self, state: State, low_noise: bool, done: float = 0.0) -> float:
        """Return the scale of a step. `done`: the share of the way from noise to picture before it, 0 to 1."""
        if done > self.cfg_truncation:
            return self.unguided
        own = getattr(state, self.scale_2) if low_noise and self.scale_2 else None
        return getattr(state, self.scale) if own is None else own

    def needed(self, branches: tuple[str, ...], scale: float) -> tuple[str, ...]:
        """Return those of `branches` that a step with this scale uses."""
        return (POSITIVE,) if scale == self.unguided else branches

    def combine(self, predictions: Mapping[str, Tensor], scale: float) -> Tensor:
        """Combine `{branch: prediction}` into one prediction. `rescale_norm` takes norms over the last dimension."""
        positive = predictions[POSITIVE]
        if NEGATIVE not in predictions or scale == self.unguided:
            return positive
        negative = predictions[NEGATIVE]
        guided = negative + (scale + (1 - self.unguided)) * (positive - negative)
        if self.rescale_norm:
            ratio = torch.norm(positive, dim=-1, keepdim=True) / torch.norm(guided, dim=-1, keepdim=True)
            return guided * (ratio.clamp(max=1) if self.rescale_norm == "down" else ratio)
        if self.cfg_normalization is None:
            return guided
        items = tuple(range(1, guided.ndim))
        norm, most = (torch.linalg.vector_norm(x, dim=items, keepdim=True) for x in (guided, positive))
        return guided * (self.cfg_normalization * most / norm).clamp(max=1.0)


class SkipLayerGuidance(ClassifierFreeGuidance):
    """Also guides away from a prediction that leaves out some of the model's blocks (skip-layer guidance).

    `layers`: the blocks left out, counted from 0 (null: off). `layers_scale`: the strength. It applies only with
    classifier-free guidance, in the steps between the fractions `start` and `stop` of the schedule. The third
    prediction has the positive branch's inputs and bypasses caches.
    """

    def __init__(
        self,
        scale: Scale = "true_cfg_scale",
        layers: list[int] | None = None,
        layers_scale: float = 2.8,
        start: float = 0.01,
        stop: float = 0.2,
    ) -> None:
        super().__init__(scale)
        self.layers = tuple(layers or ())
        self.layers_scale = layers_scale
        self.start = start
        self.stop = stop

    def branches_at(self, state: State, index: int) -> tuple[str, ...]:
        branches = self.branches(state)
        steps = state.num_inference_steps
        if not self.layers or NEGATIVE not in branches or not self.start * steps < index < self.stop * steps:
            return branches
        return POSITIVE, FEWER_BLOCKS, NEGATIVE  # next to POSITIVE: of two ranks, the first predicts both

    def combine(self, predictions: Mapping[str, Tensor], scale: float) -> Tensor:
        guided = super().combine(predictions, scale)
        if FEWER_BLOCKS not in predictions:
            return guided
        return guided + self.layers_scale * (predictions[POSITIVE] - predictions[FEWER_BLOCKS])
