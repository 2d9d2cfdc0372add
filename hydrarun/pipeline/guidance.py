"""Guidance: which branches a step predicts, and how they become one prediction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from hydrarun.models.transformer import FEWER_BLOCKS, NEGATIVE, POSITIVE
from hydrarun.pipeline.state import State

Scale = Literal["true_cfg_scale", "guidance_scale", "guidance_scale_2"]


class ClassifierFreeGuidance:
    """Classifier-free guidance (https://arxiv.org/abs/2207.12598) by a second, negative prompt.

    `scale` names the field of `sampling` that holds its scale, and `scale_2` the one that the expert for low noise has
    for itself (null there: the same). `rescale_norm` scales each token of the guided prediction to the norm of the
    positive one, which keeps high scales from burning out; `down`: only where the guided one's is larger. A model's
    YAML says whether its reference does it.
    `unguided` is the scale that is the positive prediction alone, 1 or, where the reference counts so, 0.
    `cfg_normalization` lets the norm of an item's guided prediction be so many times that of the positive one at most
    (null: any), and `cfg_truncation` ends guidance when that share of the way from noise to picture is done.
    `unprompted` names what of the prompt's conditioning is zeros in the second branch where there is no negative prompt
    (null: there must be one).
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
        self.layers: tuple[int, ...] = ()  # the blocks that FEWER_BLOCKS is predicted without
        self.scale = scale
        self.scale_2 = scale_2
        self.rescale_norm = rescale_norm
        self.unguided = unguided
        self.cfg_normalization = cfg_normalization
        self.cfg_truncation = cfg_truncation
        self.unprompted = unprompted

    def branches(self, state: State) -> tuple[str, ...]:
        """The branches of a request's steps, as the reference orders them; up to `unguided` one is enough.

        As in the reference, the first expert's scale decides for both.
        """
        return (POSITIVE, NEGATIVE) if self.scale_for(state, low_noise=False) > self.unguided else (POSITIVE,)

    def branches_at(self, state: State, index: int) -> tuple[str, ...]:
        """The predictions of the step `index`: every step's branches, and FEWER_BLOCKS where it is asked for."""
        return self.branches(state)

    def scale_for(self, state: State, low_noise: bool, done: float = 0.0) -> float:
        """The scale of a step, before which `done` of the way from noise to picture is, from 0 to 1."""
        if done > self.cfg_truncation:
            return self.unguided
        own = getattr(state, self.scale_2) if low_noise and self.scale_2 else None
        return getattr(state, self.scale) if own is None else own

    def needed(self, branches: tuple[str, ...], scale: float) -> tuple[str, ...]:
        """Of these branches those that a step of this scale goes by."""
        return (POSITIVE,) if scale == self.unguided else branches

    def combine(self, predictions: Mapping[str, Tensor], scale: float) -> Tensor:
        """`{branch: prediction}`, tokens or channels last, to one prediction."""
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
    """Also guides away from what the model predicts without some of its blocks (skip-layer guidance).

    `layers` are the blocks left out, counted from 0 (null: it is off), `layers_scale` how far it guides. It is in force
    where classifier-free guidance is on, in the steps between the fractions `start` and `stop` of the schedule. The
    third prediction comes from where the positive one does; caches leave it alone.
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
        return POSITIVE, FEWER_BLOCKS, NEGATIVE  # next to the positive one: two ranks share them as they share two

    def combine(self, predictions: Mapping[str, Tensor], scale: float) -> Tensor:
        guided = super().combine(predictions, scale)
        if FEWER_BLOCKS not in predictions:
            return guided
        return guided + self.layers_scale * (predictions[POSITIVE] - predictions[FEWER_BLOCKS])
