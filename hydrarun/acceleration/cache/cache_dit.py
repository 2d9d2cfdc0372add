"""Cache-DiT (https://github.com/vipshop/cache-dit): DBCache, TaylorSeer, SCM's masks and DBPrune, run by the library.

DBCache runs the first blocks and compares their residual with the last computed step's; while it changes little, the
kept residual of the middle blocks replaces them. DBPrune decides this for each block. The library makes the decisions,
keeps the residuals and calls the blocks; this module configures it and reads the results back.

Importing this module takes seconds, so it is loaded only if such an option is chosen.
"""

from __future__ import annotations

import inspect
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from cache_dit import DBCacheConfig, DBPruneConfig, TaylorSeerCalibratorConfig
from cache_dit.caching.cache_blocks.pattern_0_1_2 import CachedBlocks_Pattern_0_1_2, PrunedBlocks_Pattern_0_1_2
from cache_dit.caching.cache_contexts import CachedContextManager, PrunedContextManager
from cache_dit.logger import suppress_loggers
from torch import Tensor, nn

from hydrarun.acceleration.cache.base import Cache, Owner, Schedule
from hydrarun.acceleration.cache.gates import Density, choose_scm_steps
from hydrarun.core.distributed.collectives import Group, all_reduce
from hydrarun.core.errors import UsageError, require_at_least
from hydrarun.models.transformer import Step

if TYPE_CHECKING:
    from hydrarun.core.distributed.mesh import Axis, Mesh
    from hydrarun.models.transformer import Inputs, Transformer

#: mesh dimensions whose ranks decide together; ranks of `cfg` have different branches, each of which decides alone
TOGETHER = ("data", "replica", "ring", "ulysses", "tensor")

suppress_loggers(["cache_dit*"])  # the library logs every list of blocks


class DistributedCachedContext(CachedContextManager):
    """DBCache's context manager; it measures distances over the ranks of all `groups`."""

    def __init__(self, groups: Sequence[Group]) -> None:
        super().__init__()
        self.groups = groups

    def similarity(
        self, t1: Tensor, t2: Tensor, *, threshold: float, parallelized: bool = False, prefix: str = "Fn"
    ) -> bool:
        """Return whether the distance of `t2` from the kept `t1` is below `threshold`.

        The library's own reduction (`parallelized`) averages over all ranks, including those of other branches, and
        weights unequal shards equally.
        """
        if not (self.groups and 0 < threshold < 1):  # outside this range the library measures nothing
            return super().similarity(t1, t2, threshold=threshold, prefix=prefix)
        difference = self.distance(t1, t2)
        self.add_residual_diff(difference)
        return difference < threshold

    def distance(self, t1: Tensor, t2: Tensor) -> float:
        """Return the relative L1 distance, rounded to the tensors' dtype where the library rounds too."""
        sums = torch.stack([x.abs().sum(dtype=torch.float64) for x in (t1 - t2, t1)])
        sums = torch.cat([sums, sums.new_tensor([t1.numel()])])
        for group in self.groups:
            all_reduce(sums, group)
        difference, size = (sums[:2] / sums[2]).to(t1.dtype)
        return (difference / size).item()


class DistributedPrunedContext(DistributedCachedContext, PrunedContextManager):
    """The same for DBPrune."""

    # unwrapped: the library's lru_cache would keep this manager and all that it holds alive after the request
    get_non_prune_blocks_ids = inspect.unwrap(PrunedContextManager.get_non_prune_blocks_ids)


class CacheDiT(Cache):
    """DBCache, or DBPrune (`prune`). The other arguments have the library's names and meanings.

    Each branch of each expert has its own context, new for each request, and decides alone. Warm-up is the request's
    first `max_warmup_steps`: an expert that takes over later starts with one computed step, because it has nothing to
    reuse. `steps_computation_mask` is SCM's mask of the whole schedule; each expert gets its part. The limits on
    cached steps apply to each expert.
    """

    def __init__(
        self,
        Fn_compute_blocks: int = 1,  # noqa: N803
        Bn_compute_blocks: int = 0,  # noqa: N803
        max_warmup_steps: int = 4,
        residual_diff_threshold: float = 0.24,
        max_cached_steps: int = -1,
        max_continuous_cached_steps: int = 3,
        taylorseer_order: Literal[1, 2] | None = None,
        steps_computation_mask: Density | None = None,
        steps_computation_policy: Literal["dynamic", "static"] = "dynamic",
        prune: bool = False,
    ) -> None:
        super().__init__()
        require_at_least("cache.Fn_compute_blocks", Fn_compute_blocks, 1)
        require_at_least("cache.Bn_compute_blocks", Bn_compute_blocks, 0)
        require_at_least("cache.max_warmup_steps", max_warmup_steps, 1)
        require_at_least("cache.max_cached_steps", max_cached_steps, -1)
        require_at_least("cache.max_continuous_cached_steps", max_continuous_cached_steps, -1)
        if not (math.isfinite(residual_diff_threshold) and residual_diff_threshold >= 0):
            raise UsageError(f"cache.residual_diff_threshold: {residual_diff_threshold} is not a finite number >= 0")
        if steps_computation_policy == "static" and steps_computation_mask is None:
            raise UsageError(
                "cache.steps_computation_policy: static needs a mask of the steps to compute: set"
                " cache.steps_computation_mask=slow|medium|fast|ultra"
            )
        self.settings = {
            "Fn_compute_blocks": Fn_compute_blocks,
            "Bn_compute_blocks": Bn_compute_blocks,
            "residual_diff_threshold": residual_diff_threshold,
            "max_cached_steps": max_cached_steps,
            "max_continuous_cached_steps": max_continuous_cached_steps,
            "steps_computation_policy": steps_computation_policy,
            "enable_separate_cfg": False,  # it would distinguish branches by counting calls
        }
        self.always = Fn_compute_blocks + Bn_compute_blocks
        self.max_warmup_steps = max_warmup_steps
        self.taylorseer_order = taylorseer_order
        self.density = steps_computation_mask
        self.prune = prune
        self.manager: Any = None
        self.blocks: dict[Owner, nn.Module] = {}

    def clear(self) -> None:
        super().clear()
        self.statistics: dict[str, dict[str, Any]] = defaultdict(dict)

    def start(self, schedule: Schedule, branches: Sequence[str], mesh: Mesh | None) -> None:
        super().start(schedule, branches, mesh)
        self.forget()
        count = len(schedule.steps)
        self.schedule = schedule
        self.masked = self.density and schedule.firsts | frozenset(choose_scm_steps(self.density, count))
        #: blocks that each branch ran at each step, and the number of blocks
        self.blocks_at = torch.zeros(2, len(branches), count, dtype=torch.int64)
        axes = [axis for name in TOGETHER if (axis := mesh[name])] if mesh else []
        self.manager = (DistributedPrunedContext if self.prune else DistributedCachedContext)(
            [axis.group for axis in axes]
        )

    def predict(self, transformer: Transformer, inputs: Inputs, step: Step) -> dict[str, Tensor]:
        predictions = {}
        for branch in inputs.conditioning:
            owner = (step.expert, branch)
            if owner not in self.blocks:
                self.blocks[owner] = self.cached_blocks(transformer, owner)
            call = transformer.begin_branch(inputs, branch)
            transformer.resume_branch(call)
            tokens = call.tokens
            tokens.hidden_states, tokens.encoder_hidden_states = self.blocks[owner](
                tokens.hidden_states, tokens.encoder_hidden_states, tokens
            )
            self.read_back(step, branch, transformer.depth)
            predictions[branch] = transformer.finish_branch(call)
        return predictions

    def cached_blocks(self, transformer: Transformer, owner: Owner) -> nn.Module:
        """Return all blocks of an expert as one module that the library runs in a new context of the owner."""
        if self.always >= transformer.depth:
            raise UsageError(
                f"cache.Fn_compute_blocks + cache.Bn_compute_blocks: {self.always} blocks always run, and {owner[0]}"
                f" has {transformer.depth}, so none can be skipped; choose fewer"
            )
        name = "/".join(owner)
        self.manager.new_context(name=name, cache_config=self.config(owner[0]), calibrator_config=self.calibrator())
        return (PrunedBlocks_Pattern_0_1_2 if self.prune else CachedBlocks_Pattern_0_1_2)(
            nn.ModuleList(transformer.all_blocks()),
            check_forward_pattern=False,  # our own contract fixes a block's inputs and outputs
            cache_context=name,
            context_manager=self.manager,
        )

    def config(self, expert: str) -> Any:
        """Return the library's config for one expert's steps."""
        steps = self.schedule.steps_of(expert)
        return (DBPruneConfig if self.prune else DBCacheConfig)(
            **self.settings,
            num_inference_steps=len(steps),
            max_warmup_steps=max(1, sum(index < self.max_warmup_steps for index in steps)),
            steps_computation_mask=self.masked and [int(index in self.masked) for index in steps],
        )

    def calibrator(self) -> Any:
        """Return the config of the residual predictor; None: the last residuals are reused."""
        return self.taylorseer_order and TaylorSeerCalibratorConfig(taylorseer_order=self.taylorseer_order)

    def read_back(self, step: Step, branch: str, depth: int) -> None:
        """Record what the library did in the current step of a branch."""
        context = self.manager.get_context("/".join((step.expert, branch)))
        here = context.get_current_step()
        found = self.statistics[step.expert].setdefault(branch, {"residual_diffs": {}})
        if self.prune:
            pruned = context.get_pruned_blocks()[-1]
            found.setdefault("pruned_blocks", []).append(pruned)
        else:
            pruned = depth - self.always if here in context.get_cached_steps() else 0
        if differences := drop_unmeasured(context.get_residual_diffs().get(str(here), [])):
            found["residual_diffs"][str(step.index)] = differences if self.prune else differences[0]
        self.note_blocks(step, branch, depth - pruned, depth)
        self.blocks_at[:, self.branches.index(branch), step.index] = torch.tensor([depth - pruned, depth])

    def note_blocks(self, step: Step, branch: str, run: int, depth: int) -> None:
        """Record how many blocks a branch ran."""
        (self.computed if run == depth else self.skipped)[step.expert, branch].append(step.index)
        self.blocks_run += run
        self.blocks_in_all += depth

    def end(self) -> None:
        if self.mesh and (axis := self.mesh["cfg"]):
            self.share(axis, self.mesh.device)
        self.forget()

    def forget(self) -> None:
        """Release everything kept for a request."""
        self.manager = None
        self.blocks = {}

    def share(self, axis: Axis, device: torch.device) -> None:
        """Exchange the decisions between the ranks of `axis`; each branch was predicted by one of them."""
        _, own = self.blocks_at.tolist()
        run, depth = all_reduce(self.blocks_at.to(device), axis.group).tolist()
        for place, branch in enumerate(self.branches):
            for step in self.schedule.steps:
                if not own[place][step.index]:
                    self.note_blocks(step, branch, run[place][step.index], depth[place][step.index])

    def record(self) -> dict[str, Any]:
        """Return the base record and `statistics` of this rank's own branches.

        They hold the measured relative distances by step (for each block with `prune`) and, with `prune`, the number
        of pruned blocks at each of the expert's steps.
        """
        return super().record() | {"statistics": {expert: {**found} for expert, found in self.statistics.items()}}


def drop_unmeasured(differences: float | list[float]) -> list[float]:
    """Return the distances that the library measured at a step; negative or infinite entries are not measurements."""
    found = differences if isinstance(differences, list) else [differences]
    return [difference for difference in found if 0 <= difference < math.inf]
