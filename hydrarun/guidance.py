"""Guidance: which branches a step predicts, and how they become one prediction."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

POSITIVE, NEGATIVE = "positive", "negative"


class ClassifierFreeGuidance:
    """Classifier-free guidance (https://arxiv.org/abs/2207.12598) by a second, negative prompt.

    `rescale_norm` scales each token of the guided prediction to the norm of the positive one, which keeps high scales
    from burning out; a model's YAML says whether its reference does it.
    """

    def __init__(self, rescale_norm: bool = False) -> None:
        self.rescale_norm = rescale_norm

    def branches(self, scale: float) -> tuple[str, ...]:
        """The branches of a step, in the order in which the reference computes them. Scales up to 1 need no second."""
        return (POSITIVE, NEGATIVE) if scale > 1 else (POSITIVE,)

    def combine(self, predictions: Mapping[str, Tensor], scale: float) -> Tensor:
        """`{branch: [B, S, C]}` to `[B, S, C]`."""
        positive = predictions[POSITIVE]
        if NEGATIVE not in predictions:
            return positive
        negative = predictions[NEGATIVE]
        guided = negative + scale * (positive - negative)
        if not self.rescale_norm:
            return guided
        return guided * (torch.norm(positive, dim=-1, keepdim=True) / torch.norm(guided, dim=-1, keepdim=True))
