"""Predictors: they predict the residual of a skipped step from those of computed steps."""

from __future__ import annotations

import math
from collections import defaultdict

from torch import Tensor

from hydrarun.acceleration.cache.base import Owner
from hydrarun.core.errors import UsageError


class Predictor:
    """Keeps the residuals of each owner's last computed steps, and predicts that of a skipped step."""

    #: number of residuals that are kept
    keeps = 1

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all residuals."""
        self.known: dict[Owner, list[tuple[float, Tensor]]] = defaultdict(list)

    def update(self, owner: Owner, timestep: float, residual: Tensor) -> None:
        """Add a computed step's residual, `[B, S, D]`."""
        others = [known for known in self.known[owner] if known[0] != timestep]  # Heun predicts twice at a timestep
        self.known[owner] = [*others, (timestep, residual)][-self.keeps :]

    def extrapolate(self, owner: Owner, timestep: float) -> Tensor:
        """Return the predicted residual of a skipped step."""
        raise NotImplementedError


class Reuse(Predictor):
    """Reuses the last computed step's residual."""

    def extrapolate(self, owner: Owner, timestep: float) -> Tensor:
        return self.known[owner][-1][1]


class Taylor(Predictor):
    """Extrapolates the residual over the timesteps with a straight line (`order` 1) or a parabola (2).

    The curve passes through the last computed steps, at any distances, so it is exact where the residual is a
    polynomial of that order. (TaylorSeer, https://arxiv.org/abs/2503.06923, assumes evenly spaced steps.)
    Until enough steps are known, the order is lower.
    """

    def __init__(self, order: int = 1) -> None:
        if order not in (1, 2):
            raise UsageError(f"cache.predictor.order: {order} is not 1 or 2")
        self.keeps = order + 1
        super().__init__()

    def extrapolate(self, owner: Owner, timestep: float) -> Tensor:
        times, residuals = zip(*self.known[owner], strict=True)
        weights = find_extrapolation(times, timestep)
        return sum(weight * residual for weight, residual in zip(weights, residuals, strict=True))


def find_extrapolation(times: tuple[float, ...], at: float) -> list[float]:
    """Return the weights that combine values at `times` into their polynomial's value at `at` (Lagrange)."""
    return [
        math.prod((at - other) / (time - other) for j, other in enumerate(times) if j != i)
        for i, time in enumerate(times)
    ]
