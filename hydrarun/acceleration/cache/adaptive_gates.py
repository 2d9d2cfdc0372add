"""Gates that measure a signal: they skip steps while it changes little.

With a threshold of 0 every step is computed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from hydrarun.acceleration.cache.base import Schedule
from hydrarun.acceleration.cache.gates import Gate, check_end_counts, find_end_steps
from hydrarun.core.errors import UsageError
from hydrarun.models.transformer import Step

if TYPE_CHECKING:
    from hydrarun.models.transformer import ForwardContext, Transformer


class AdaptiveGate(Gate):
    """Computes the request's `first` and `last` steps, and those between that its rule selects."""

    measures = True

    def __init__(self, threshold: float, first: int, last: int) -> None:
        if not (math.isfinite(threshold) and threshold >= 0):
            raise UsageError(f"cache.gate.threshold: {threshold} is not a finite number >= 0")
        self.threshold = threshold
        self.first, self.last = check_end_counts(first, last)

    def start(self, schedule: Schedule) -> None:
        self.always = find_end_steps(schedule, self.first, self.last)


class TeaCache(AdaptiveGate):
    """Accumulates the change of the first block's modulated input, rescaled by a polynomial to the output's change.

    A step is computed once the sum since the last computed step reaches `threshold` (TeaCache,
    https://arxiv.org/abs/2411.19108). `fit` holds the polynomial of each expert, highest power first, as
    `coefficients: {transformer: […]}`, and names the model that it was fitted on (`hydrarun calibrate` writes it).
    """

    follows = True

    def __init__(self, threshold: float, fit: dict[str, Any], first: int = 1, last: int = 1) -> None:
        super().__init__(threshold, first, last)
        self.coefficients: dict[str, list[float]] = fit["coefficients"]

    def start(self, schedule: Schedule) -> None:
        super().start(schedule)
        self.accumulated: dict[tuple[str, str], float] = {}

    def measure_signal(self, transformer: Transformer, call: ForwardContext, start: Tensor) -> Tensor:
        return transformer.gate_signal(call.tokens)

    def should_compute(self, step: Step, changes: Mapping[str, float]) -> bool:
        for branch, change in changes.items():
            expected = max(0.0, float(np.polyval(self.coefficients[step.expert], change)))
            self.accumulated[step.expert, branch] = self.accumulated.get((step.expert, branch), 0.0) + expected
        reached = any(self.accumulated[step.expert, branch] >= self.threshold for branch in changes)
        computes = not changes or reached or step.index in self.always
        if computes:
            self.accumulated = {owner: value for owner, value in self.accumulated.items() if owner[0] != step.expert}
        return computes


class FirstBlock(AdaptiveGate):
    """Runs the first block and compares its residual with that of the last computed step.

    A step is computed once the relative L1 distance reaches `threshold` (first-block cache, ParaAttention).
    """

    prefix = 1

    def __init__(self, threshold: float, first: int = 1, last: int = 1) -> None:
        super().__init__(threshold, first, last)

    def measure_signal(self, transformer: Transformer, call: ForwardContext, start: Tensor) -> Tensor:
        return call.tokens.hidden_states - start

    def should_compute(self, step: Step, changes: Mapping[str, float]) -> bool:
        reached = any(change >= self.threshold for change in changes.values())
        return not changes or reached or step.index in self.always
