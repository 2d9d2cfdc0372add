"""Gates decide which steps are computed. Those in this file decide before the first step, from the schedule alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from hydrarun.acceleration.cache.base import Schedule
from hydrarun.core.errors import UsageError, require_at_least
from hydrarun.models.transformer import Step

if TYPE_CHECKING:
    from hydrarun.models.transformer import ForwardContext, Transformer

Density = Literal["slow", "medium", "fast", "ultra"]


class Gate:
    """Decides for each step whether it is computed. The first step of each expert is computed in any case."""

    #: number of blocks that run at every step, before the decision
    prefix = 0
    #: whether the gate compares signals; if so, `measure_signal` returns them
    measures = False
    #: whether a signal is compared with the previous step's; if not, with the last computed step's
    follows = False

    def start(self, schedule: Schedule) -> None:
        """Start a request. Raises `UsageError` for a gate that does not fit the schedule."""
        raise NotImplementedError

    def measure_signal(self, transformer: Transformer, call: ForwardContext, start: Tensor) -> Tensor:
        """Return the signal to compare, of any shape. `start`: the tokens `[B, S, D]` before the first block."""
        raise NotImplementedError

    def should_compute(self, step: Step, changes: Mapping[str, float]) -> bool:
        """Return whether to compute `step`. `changes`: relative L1 distance of each branch's signal.

        `changes` is empty at an expert's first step, and always if the gate does not measure.
        """
        raise NotImplementedError


class PlannedGate(Gate):
    """A gate whose steps, and so its cost, are known beforehand. It measures nothing."""

    def start(self, schedule: Schedule) -> None:
        self.planned = self.plan(schedule)

    def plan(self, schedule: Schedule) -> frozenset[int]:
        """Return the computed steps."""
        raise NotImplementedError

    def should_compute(self, step: Step, changes: Mapping[str, float]) -> bool:
        return step.index in self.planned


class EveryN(PlannedGate):
    """Computes every `n`-th step of each expert, from its first, and the request's `first` and `last` steps."""

    def __init__(self, n: int, first: int = 1, last: int = 1) -> None:
        self.n = require_at_least("cache.gate.n", n, 1)
        self.first, self.last = check_end_counts(first, last)

    def plan(self, schedule: Schedule) -> frozenset[int]:
        every = {
            index for first in schedule.firsts for index in schedule.steps_of(schedule.steps[first].expert)[:: self.n]
        }
        return frozenset(every | find_end_steps(schedule, self.first, self.last))


class Mask(PlannedGate):
    """Computes a list of `steps`, counted from 0, or the steps of a named `density`.

    The densities are SCM's (cache-dit): 18, 15, 11 and 8 of 28 steps, most of them early. A density adds the first
    step of each expert; a list must contain it. `num_inference_steps`, if set, is the number of steps that the list is
    for: the compatibility table refuses other numbers.
    """

    def __init__(
        self, steps: list[int] | None = None, density: Density | None = None, num_inference_steps: int | None = None
    ) -> None:
        if (steps is None) == (density is None):
            raise UsageError("cache.gate: give one of steps=[0,1,3,…] and density=slow|medium|fast|ultra, not both")
        self.steps, self.density, self.num_inference_steps = steps, density, num_inference_steps

    def plan(self, schedule: Schedule) -> frozenset[int]:
        count = len(schedule.steps)
        if self.density is not None:
            return frozenset(choose_scm_steps(self.density, count)) | schedule.firsts
        assert self.steps is not None
        check_steps(self.steps, count)
        for index in sorted(schedule.firsts - set(self.steps)):
            raise UsageError(
                f"cache.gate.steps: step {index} is the first of {schedule.steps[index].expert}, which has nothing to"
                f" reuse yet: put {index} into the list"
            )
        return frozenset(self.steps)


def check_steps(steps: list[int], count: int) -> None:
    """Raise `UsageError` for a list that does not fit a run of `count` steps."""
    wrong = [step for step in steps if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < count]
    if wrong:
        raise UsageError(
            f"cache.gate.steps: {wrong[0]!r} is not a step of this run of {count} steps, numbered 0 to {count - 1}"
        )
    if len(set(steps)) < len(steps):
        raise UsageError("cache.gate.steps: a step is listed twice")


def choose_scm_steps(density: Density, count: int) -> list[int]:
    """Return cache-dit's computed steps of a run of `count` steps at a named density."""
    from cache_dit import steps_mask  # takes seconds to import

    return [index for index, computed in enumerate(steps_mask(total_steps=count, mask_policy=density)) if computed]


def find_end_steps(schedule: Schedule, first: int, last: int) -> frozenset[int]:
    """Return the request's first and last steps."""
    count = len(schedule.steps)
    return frozenset(range(min(first, count))) | frozenset(range(max(0, count - last), count))


def check_end_counts(first: int, last: int) -> tuple[int, int]:
    """Return the numbers of steps that are always computed at both ends. Raises `UsageError` for invalid numbers."""
    return require_at_least("cache.gate.first", first, 1), require_at_least("cache.gate.last", last, 0)
