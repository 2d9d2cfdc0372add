"""The dry forward: runs a run's own stages on the meta device, where tensors have sizes but no values.

The loop runs only as many steps as fill the cache, and a few of equal blocks. Their work counts for all.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from hydrarun.acceleration.cache.base import Cache, NoCache, Schedule
from hydrarun.acceleration.cache.step_cache import StepCache
from hydrarun.config.checks.checkpoint import DEPTHS
from hydrarun.core.device import HOST
from hydrarun.core.timing import Timings
from hydrarun.engine.plan.meter import META, HostReadError, Meter, Work
from hydrarun.models.transformer import Step, Transformer
from hydrarun.pipeline.stage import Components, Stage
from hydrarun.pipeline.stages.denoise import Denoise, expand_rows, find_step_kind, make_noise_source, make_schedule
from hydrarun.pipeline.state import State


@dataclass(frozen=True)
class StageEstimate:
    """The estimate of one stage."""

    phase: str
    uses: tuple[str, ...]
    #: peak bytes in addition to weights: activations, and results of earlier stages
    activations: int
    #: work of all steps; for denoising, of those that compute the blocks
    work: Work
    #: number of forwards of the components that it uses
    forwards: int = 1
    #: for denoising, the part of the activations that a cache keeps from step to step
    cache: int = 0


class DryForward:
    """Runs the stages of a run with components on the meta device."""

    def __init__(self, stages: Sequence[Stage], parts: Components, meter: Meter) -> None:
        self.stages = stages
        self.parts = parts
        self.meter = meter

    def run(self, state: State) -> list[StageEstimate]:
        """Run every stage in order. `state` is this rank's request; the stages' results go to the meta device."""
        estimates = []
        with torch.inference_mode(), self.meter:
            for stage in self.stages:
                self.meter.peak = self.meter.live
                estimate = self.denoise(stage, state) if isinstance(stage, Denoise) else self.run_stage(stage, state)
                estimate = replace(estimate, activations=self.meter.peak)
                move_to_meta(state)
                estimates.append(estimate)
        return estimates

    def run_stage(self, stage: Stage, state: State) -> StageEstimate:
        """Run a stage unchanged. Meta components encode prompts from the host; pixels and latents are on the device."""
        there, before = META if {"vae", "transformer"} & set(stage.uses) else HOST, self.meter.so_far()
        self.meter.host_too = "text_encoder" in stage.uses
        with suppress(HostReadError):
            stage(state, replace(self.parts, device=there), Timings(HOST))
        self.meter.host_too = False
        forwards = len(self.parts.guidance.branches(state)) if "text_encoder" in stage.uses else 1
        return StageEstimate(stage.phase, stage.uses, 0, self.meter.so_far() - before, forwards)

    def denoise(self, stage: Denoise, state: State) -> StageEstimate:
        """Run as many first steps as fill the cache, and one of each kind. Their work counts for all steps.

        A prediction that skips some blocks counts as one with all blocks.
        """
        parts = self.parts
        shared = {name: expand_rows(getattr(state, name), len(state.latents)) for name in stage.passes}
        conditioning = {branch: {**state.conditioning[branch], **shared} for branch in parts.guidance.branches(state)}
        steps = make_schedule(state.timesteps, parts.experts)
        kinds = [find_step_kind(state, parts, step) for step in steps]
        firsts = {kinds[step.index]: step.index for step in reversed(steps)}
        count = count_fill_steps(parts.cache)
        start_cache(parts.cache, steps, list(conditioning), parts.mesh)
        step, noise = parts.pipeline.scheduler.step, make_noise_source(parts.pipeline.scheduler, state)
        work: dict[Any, Work] = {}
        for index in sorted({*range(min(count, len(steps))), *firsts.values()}):
            timestep, before = state.timesteps[index], self.meter.so_far()
            prediction = stage.predict(state, parts, conditioning, timestep.to(META), steps[index], rows=None)
            work[kinds[index]] = self.meter.so_far() - before
            state.latents = step(prediction, timestep, state.latents, return_dict=False, **noise)[0]
        self.meter.peak += sum(count_unrun_bytes(transformer) for transformer in parts.experts)
        counts = Counter(kinds[one.index] for one in steps if is_computed(parts.cache, one))
        full = self.meter.live
        parts.cache.end()
        total = sum((work[one] * count for one, count in counts.items()), Work())
        ranks = parts.mesh.degrees["cfg_degree"] if parts.mesh else 1
        forwards = sum(math.ceil(len(branches) / ranks) * count for (_, branches), count in counts.items())
        return StageEstimate(stage.phase, stage.uses, 0, total, forwards, full - self.meter.live)


def count_unrun_bytes(transformer: Transformer) -> int:
    """Return the bytes kept by the blocks that the dry forward omits: per block as much as by those that run."""
    depth = sum(transformer.config.get(key) or 0 for key in DEPTHS)
    return transformer.kept_bytes() * (depth - transformer.depth) // transformer.depth


def is_computed(cache: Any, step: Step) -> bool:
    """Return whether a step computes the blocks. True if the gate decides from values, which are unknown here."""
    planned = isinstance(cache, StepCache) and getattr(cache.gate, "planned", None)
    return not planned or step.index in planned


def count_fill_steps(cache: Cache) -> int:
    """Return the number of steps after which a cache is full."""
    if isinstance(cache, StepCache):
        return cache.predictor.keeps + 1
    order = getattr(cache, "taylorseer_order", None)
    return 1 if isinstance(cache, NoCache) else 2 + (order or 0)


def start_cache(cache: Any, steps: tuple[Step, ...], branches: list[str], mesh: Any) -> None:
    """Start a request in which every step is computed: there are no values to compare."""
    cache.start(Schedule(steps), branches, mesh)
    if isinstance(cache, StepCache):
        cache.firsts = frozenset(range(len(steps)))


def move_to_meta(state: State) -> None:
    """Move the stages' results to the meta device. The timesteps stay on the host, where the scheduler reads them."""
    for name in State.stage_fields() - {"timesteps", "frames"}:
        setattr(state, name, tree_map(lambda x: x.to(META) if isinstance(x, Tensor) else x, getattr(state, name)))
