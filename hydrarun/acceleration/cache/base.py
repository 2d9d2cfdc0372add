"""Base of the caches. A cache sits between the loop and the transformer's blocks and keeps state from step to step.

The state is kept by expert and branch, which the loop names in each call; nothing counts calls.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from torch import Tensor

from hydrarun.models.transformer import Step

if TYPE_CHECKING:
    from hydrarun.core.distributed.mesh import Mesh
    from hydrarun.models.transformer import Inputs, Transformer

#: owner of a state: the expert's name, the branch's name
Owner = tuple[str, str]


@dataclass(frozen=True)
class Schedule:
    """All steps of a request, known before the first step runs."""

    steps: tuple[Step, ...]

    @property
    def firsts(self) -> frozenset[int]:
        """The first step of each expert, where there is nothing to reuse."""
        first: dict[str, int] = {}
        for step in self.steps:
            first.setdefault(step.expert, step.index)
        return frozenset(first.values())

    def steps_of(self, expert: str) -> list[int]:
        """Return the steps of one expert."""
        return [step.index for step in self.steps if step.expert == expert]


class Cache:
    """Computes every step. Base class of the caches that skip some.

    For each request the loop calls `start`, then `predict` for every step in order, then `end`.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget the last request."""
        self.branches: tuple[str, ...] = ()
        self.mesh: Mesh | None = None
        self.computed: dict[Owner, list[int]] = defaultdict(list)
        self.skipped: dict[Owner, list[int]] = defaultdict(list)
        self.blocks_run = self.blocks_in_all = 0

    def start(self, schedule: Schedule, branches: Sequence[str], mesh: Mesh | None) -> None:
        """Start a request. `branches`: those of all ranks; `mesh`: this rank's process groups."""
        self.clear()
        self.branches = tuple(branches)
        self.mesh = mesh

    def predict(self, transformer: Transformer, inputs: Inputs, step: Step) -> dict[str, Tensor]:
        """Return `{branch: prediction}` of this rank's branches."""
        predictions = {branch: transformer.predict_branch(inputs, branch) for branch in inputs.conditioning}
        self.record_step(step, transformer, inputs, computed=True)
        return predictions

    def end(self) -> None:
        """End the request: release everything kept for it except the record."""

    def record_step(
        self, step: Step, transformer: Transformer, inputs: Inputs, computed: bool, always: int = 0
    ) -> None:
        """Record a decision that holds for all branches. `always`: number of blocks that also run in a skipped step.

        A step may have fewer branches than the request if this rank has all of them.
        """
        apart = self.mesh is not None and self.mesh["cfg"] is not None
        for branch in self.branches if apart else inputs.conditioning:
            (self.computed if computed else self.skipped)[step.expert, branch].append(step.index)
            self.blocks_in_all += transformer.depth
            self.blocks_run += transformer.depth if computed else always

    def summarize(self, steps_s: Sequence[float]) -> dict[str, Any]:
        """Return what run.json records of the last request: `record`, and median seconds of both kinds of steps.

        A step counts as computed if it was computed for any branch; null: there was no such step.
        """
        computed = {index for steps in self.computed.values() for index in steps}
        kinds = {
            "computed_step_s": [seconds for index, seconds in enumerate(steps_s) if index in computed],
            "skipped_step_s": [seconds for index, seconds in enumerate(steps_s) if index not in computed],
        }
        return self.record() | {name: median(seconds) if seconds else None for name, seconds in kinds.items()}

    def record(self) -> dict[str, Any]:
        """Return the computed and skipped steps by expert and branch, and how many blocks ran."""
        owners = sorted({*self.computed, *self.skipped}, key=lambda owner: (owner[0], self.branches.index(owner[1])))
        steps: dict[str, dict[str, Any]] = defaultdict(dict)
        for expert, branch in owners:
            steps[expert][branch] = {
                "computed": self.computed[expert, branch],
                "skipped": self.skipped[expert, branch],
            }
        return {"steps": dict(steps), "blocks": {"run": self.blocks_run, "all": self.blocks_in_all}}


class NoCache(Cache):
    """Computes every step."""
