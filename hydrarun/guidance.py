"""Guidance: which branches a step predicts, and how they become one prediction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from hydrarun.state import State

POSITIVE, NEGATIVE = "positive", "negative"
#: the prompt's prediction with some blocks left out
FEWER_BLOCKS = "fewer_blocks"
Scale = Literal["true_cfg_scale", "guidance_scale", "guidance_scale_2"]


class ClassifierFreeGuidance:
    """Classifier-free guidance (https://arxiv.org/abs/2207.12598) by a second, negative prompt.

    `scale` names the field of `sampling` that holds its scale, and `scale_2` the one that the expert for low noise has
    for itself (null there: the same). `rescale_norm` scales each token of the guided prediction to the norm of the
    positive one, which keeps high scales from burning out; `down`: only where the guided one's is larger. A model's
    YAML says whether its reference does it.
    """

    def __init__(
        self,
        scale: Scale = "true_cfg_scale",
        scale_2: Scale | None = None,
        rescale_norm: bool | Literal["down"] = False,
    ) -> None:
        self.layers: tuple[int, ...] = ()  # the blocks that FEWER_BLOCKS is predicted without
        self.scale = scale
        self.scale_2 = scale_2
        self.rescale_norm = rescale_norm

    def branches(self, state: State) -> tuple[str, ...]:
        """The branches of every step, in the order in which the reference computes them. Scales up to 1 need no second.

        As in the reference, the first expert's scale decides for both.
        """
        return (POSITIVE, NEGATIVE) if self.scale_for(state, low_noise=False) > 1 else (POSITIVE,)

    def branches_at(self, state: State, index: int) -> tuple[str, ...]:
        """The predictions of the step `index`: every step's branches, and FEWER_BLOCKS where it is asked for."""
        return self.branches(state)

    def scale_for(self, state: State, low_noise: bool) -> float:
        """The scale of a step."""
        own = getattr(state, self.scale_2) if low_noise and self.scale_2 else None
        return getattr(state, self.scale) if own is None else own

    def combine(self, predictions: Mapping[str, Tensor], scale: float) -> Tensor:
        """`{branch: prediction}`, tokens or channels last, to one prediction."""
        positive = predictions[POSITIVE]
        if NEGATIVE not in predictions:
            return positive
        negative = predictions[NEGATIVE]
        guided = negative + scale * (positive - negative)
        if not self.rescale_norm:
            return guided
        ratio = torch.norm(positive, dim=-1, keepdim=True) / torch.norm(guided, dim=-1, keepdim=True)
        return guided * (ratio.clamp(max=1) if self.rescale_norm == "down" else ratio)


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
