"""Gates: which steps are computed. Those here know it beforehand, from the schedule alone."""

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
    """Decides for each step whether it is computed. The first step of each expert is, whatever a gate says."""

    #: blocks that run at every step, before the decision
    prefix = 0
    #: whether it compares signals; then `signal` gives them
    measures = False
    #: whether a signal is compared with the last step's; if not, with that of the last step that was computed
    follows = False

    def start(self, schedule: Schedule) -> None:
        """A new request. Raises `UsageError` for a gate that does not fit the schedule."""
        raise NotImplementedError

    def measure_signal(self, transformer: Transformer, call: ForwardContext, start: Tensor) -> Tensor:
        """What is compared, of any shape; `start` are the tokens `[B, S, D]` as they were before the first block."""
        raise NotImplementedError

    def should_compute(self, step: Step, changes: Mapping[str, float]) -> bool:
        """Whether to compute `step`; `changes`: each branch's relative L1 distance, none at an expert's first step."""
        raise NotImplementedError


class PlannedGate(Gate):
    """Knows the steps beforehand: the cost too, and nothing is measured."""

    def start(self, schedule: Schedule) -> None:
        self.planned = self.plan(schedule)

    def plan(self, schedule: Schedule) -> frozenset[int]:
        """The steps that are computed."""
        raise NotImplementedError

    def should_compute(self, step: Step, changes: Mapping[str, float]) -> bool:
        return step.index in self.planned


class EveryN(PlannedGate):
    """Every `n`-th step of each expert, counted from its first; the request's `first` and `last` steps always."""

    def __init__(self, n: int, first: int = 1, last: int = 1) -> None:
        self.n = require_at_least("cache.gate.n", n, 1)
        self.first, self.last = check_end_counts(first, last)

    def plan(self, schedule: Schedule) -> frozenset[int]:
        every = {
            index for first in schedule.firsts for index in schedule.steps_of(schedule.steps[first].expert)[:: self.n]
        }
        return frozenset(every | find_end_steps(schedule, self.first, self.last))


class Mask(PlannedGate):
    """A list of computed `steps`, from 0, or a named `density`.

    The densities are SCM's (cache-dit): 18, 15, 11 and 8 of 28 steps, most of them early. In them the first step of
    each expert is computed too; in a list it must stand. A list is for runs of `num_inference_steps`, where that is
    said: the compatibility table refuses others.
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
    """Raises `UsageError` for a list that is none of steps of a run of `count` of them."""
    wrong = [step for step in steps if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < count]
    if wrong:
        raise UsageError(f"cache.gate.steps: {wrong[0]!r} is no step of a run of {count}, which are 0 to {count - 1}")
    if len(set(steps)) < len(steps):
        raise UsageError("cache.gate.steps: a step is listed twice")


def choose_scm_steps(density: Density, count: int) -> list[int]:
    """The computed steps of `count` at a named density, by cache-dit."""
    from cache_dit import steps_mask  # takes seconds to import

    return [index for index, computed in enumerate(steps_mask(total_steps=count, mask_policy=density)) if computed]


def find_end_steps(schedule: Schedule, first: int, last: int) -> frozenset[int]:
    """The request's first and last steps."""
    count = len(schedule.steps)
    return frozenset(range(min(first, count))) | frozenset(range(max(0, count - last), count))


def check_end_counts(first: int, last: int) -> tuple[int, int]:
    """How many steps at both ends are always computed. Raises `UsageError` for counts that cannot be."""
    return require_at_least("cache.gate.first", first, 1), require_at_least("cache.gate.last", last, 0)
