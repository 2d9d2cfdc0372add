"""A cache that skips nothing and records the changes that a gate would measure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from hydrarun.acceleration.cache.base import Cache, Owner, Schedule
from hydrarun.acceleration.cache.step_cache import divide_change, sum_change_and_size
from hydrarun.models.transformer import Step

if TYPE_CHECKING:
    from hydrarun.core.distributed.mesh import Mesh
    from hydrarun.models.transformer import Inputs, Transformer


class RecordingCache(Cache):
    """Computes every step and compares it with the previous step of the same expert, in one process.

    `pairs` holds, for each expert and branch over all requests, the changes of TeaCache's signal and of the
    prediction: relative L1 distances over the whole batch, as `StepCache` measures them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pairs: dict[Owner, list[tuple[float, float]]] = defaultdict(list)
        self.last: dict[Owner, tuple[Tensor, Tensor]] = {}

    def start(self, schedule: Schedule, branches: Sequence[str], mesh: Mesh | None) -> None:
        super().start(schedule, branches, mesh)
        self.last.clear()

    def predict(self, transformer: Transformer, inputs: Inputs, step: Step) -> dict[str, Tensor]:
        predictions = {}
        for branch in inputs.conditioning:
            call = transformer.begin_branch(inputs, branch)
            signal = transformer.gate_signal(call.tokens)
            transformer.run_blocks(call)
            predictions[branch] = transformer.finish_branch(call)
            self.keep((step.expert, branch), (signal, predictions[branch]))
        self.record_step(step, transformer, inputs, computed=True)
        return predictions

    def keep(self, owner: Owner, now: tuple[Tensor, Tensor]) -> None:
        """Compare a step's signal and prediction with the previous step's, and keep them for the next step."""
        if owner in self.last:
            changes = [sum_change_and_size(new, old) for new, old in zip(now, self.last[owner], strict=True)]
            x, y = (divide_change(*change.tolist()) for change in changes)
            self.pairs[owner].append((x, y))
        self.last[owner] = now

    def end(self) -> None:
        self.last.clear()
