"""Predictors: the residual of a skipped step from those of the computed ones."""

from __future__ import annotations

import math
from collections import defaultdict

from torch import Tensor

from hydrarun.acceleration.cache.base import Owner
from hydrarun.core.errors import UsageError


class Predictor:
    """Keeps the residuals of the last computed steps of each owner, and expects one for a skipped step."""

    #: residuals that are kept
    keeps = 1

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """A new request."""
        self.known: dict[Owner, list[tuple[float, Tensor]]] = defaultdict(list)

    def update(self, owner: Owner, timestep: float, residual: Tensor) -> None:
        """A computed step's residual, `[B, S, D]`."""
        others = [known for known in self.known[owner] if known[0] != timestep]  # Heun predicts twice at a timestep
        self.known[owner] = [*others, (timestep, residual)][-self.keeps :]

    def extrapolate(self, owner: Owner, timestep: float) -> Tensor:
        """The residual of a skipped step."""
        raise NotImplementedError


class Reuse(Predictor):
    """The last computed step's residual."""

    def extrapolate(self, owner: Owner, timestep: float) -> Tensor:
        return self.known[owner][-1][1]


class Taylor(Predictor):
    """The residual's course over the timesteps, continued: a straight line (`order` 1) or a parabola (2).

    It goes through the last computed steps, wherever they lie, and so is exact where the residual is a polynomial of
    that order. (TaylorSeer, https://arxiv.org/abs/2503.06923, takes differences between steps at even distances.)
    Until enough steps are known the order is lower.
    """

    def __init__(self, order: int = 1) -> None:
        if order not in (1, 2):
            raise UsageError(f"cache.predictor.order: {order} is none of 1, 2")
        self.keeps = order + 1
        super().__init__()

    def extrapolate(self, owner: Owner, timestep: float) -> Tensor:
        times, residuals = zip(*self.known[owner], strict=True)
        weights = find_extrapolation(times, timestep)
        return sum(weight * residual for weight, residual in zip(weights, residuals, strict=True))


def find_extrapolation(times: tuple[float, ...], at: float) -> list[float]:
    """The weights by which values at `times` make that of their polynomial at another time (Lagrange)."""
    return [
        math.prod((at - other) / (time - other) for j, other in enumerate(times) if j != i)
        for i, time in enumerate(times)
    ]
