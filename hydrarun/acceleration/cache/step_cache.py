"""Skip whole steps: a gate decides which, and a predictor replaces their blocks.

A computed step keeps the residual of its blocks (what they add to the latent tokens). A skipped step embeds its input,
adds the predicted residual and passes the sum to the head, as TeaCache does (https://arxiv.org/abs/2411.19108).

A decision holds for all branches, items and ranks: it is made from sums over all of them. If branches decided
separately, guidance would combine a fresh prediction with a stale one; if ranks did, they would deadlock.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hydrarun.acceleration.cache.base import Cache, Owner, Schedule
from hydrarun.acceleration.cache.gates import Gate
from hydrarun.acceleration.cache.predictors import Predictor
from hydrarun.config.targets import instantiate
from hydrarun.core.distributed.collectives import all_reduce, get_world_group
from hydrarun.models.transformer import Step

if TYPE_CHECKING:
    from hydrarun.core.distributed.mesh import Mesh
    from hydrarun.models.transformer import ForwardContext, Inputs, Transformer


class StepCache(Cache):
    """Combines a `gate` and a `predictor`, both `_target_` nodes."""

    def __init__(self, gate: dict[str, Any], predictor: dict[str, Any]) -> None:
        super().__init__()
        self.gate: Gate = instantiate(gate, "cache.gate")
        self.predictor: Predictor = instantiate(predictor, "cache.predictor")
        self.signals: dict[Owner, Tensor] = {}

    def start(self, schedule: Schedule, branches: Sequence[str], mesh: Mesh | None) -> None:
        super().start(schedule, branches, mesh)
        self.firsts = schedule.firsts
        self.forget()
        self.gate.start(schedule)

    def predict(self, transformer: Transformer, inputs: Inputs, step: Step) -> dict[str, Tensor]:
        calls = {branch: transformer.begin_branch(inputs, branch) for branch in inputs.conditioning}
        prefix = self.gate.prefix
        starts = {branch: call.tokens.hidden_states for branch, call in calls.items()}
        if prefix:
            for call in calls.values():
                transformer.run_blocks(call, 0, prefix)
        computes = self.decide(transformer, calls, starts, step)
        predictions = {}
        for branch in list(calls):
            call, owner = calls.pop(branch), (step.expert, branch)
            before = call.tokens.hidden_states
            if computes:
                transformer.run_blocks(call, prefix)
                self.predictor.update(owner, step.timestep, call.tokens.hidden_states - before)
            else:
                call.tokens.hidden_states = before + self.predictor.extrapolate(owner, step.timestep)
            predictions[branch] = transformer.finish_branch(call)
        self.record_step(step, transformer, inputs, computes, always=prefix)
        return predictions

    def decide(
        self, transformer: Transformer, calls: Mapping[str, ForwardContext], starts: Mapping[str, Tensor], step: Step
    ) -> bool:
        """Return whether this step's blocks run."""
        signals = {
            (step.expert, branch): self.gate.measure_signal(transformer, call, starts[branch])
            for branch, call in calls.items()
            if self.gate.measures
        }
        first = step.index in self.firsts
        changes = self.changes(signals, step) if self.gate.measures and not first else {}
        computes = self.gate.should_compute(step, changes) or first
        if computes or self.gate.follows:
            self.signals.update(signals)
        return computes

    def changes(self, signals: Mapping[Owner, Tensor], step: Step) -> dict[str, float]:
        """Return each branch's relative L1 distance from its kept signal, over all items and ranks."""
        sums = torch.zeros(len(self.branches), 2)
        for owner, signal in signals.items():
            change = sum_change_and_size(signal, self.signals[owner])
            sums = sums.to(change.device)
            sums[self.branches.index(owner[1])] = change
        if self.mesh:
            all_reduce(sums, get_world_group())
        return {branch: divide_change(*both) for branch, both in zip(self.branches, sums.tolist(), strict=True)}

    def end(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Release everything kept for a request."""
        self.signals.clear()
        self.predictor.reset()


def sum_change_and_size(new: Tensor, old: Tensor) -> Tensor:
    """Return `[2]` float32: the sums of `|new - old|` and of `|old|`."""
    return torch.stack([(new - old).abs().sum(dtype=torch.float32), old.abs().sum(dtype=torch.float32)])


def divide_change(change: float, size: float) -> float:
    """Return the relative L1 distance; 0 if `size` is 0."""
    return change / size if size else 0.0
