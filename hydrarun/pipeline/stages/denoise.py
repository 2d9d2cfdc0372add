"""The denoising loop of all models: timesteps x experts x guidance branches."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hydrarun.acceleration.cache.base import NoCache, Schedule
from hydrarun.acceleration.offload.modulation_tables import find_step_rows
from hydrarun.acceleration.parallel.cfg import predict_branches
from hydrarun.core.errors import RunError
from hydrarun.core.timing import Timings
from hydrarun.models.experts import LOW_NOISE, Experts
from hydrarun.models.transformer import FEWER_BLOCKS, POSITIVE, Inputs, Step
from hydrarun.pipeline.stage import Components, Stage
from hydrarun.pipeline.state import State


class Denoise(Stage):
    """Predicts each branch, combines the predictions and steps the scheduler.

    `passes` names the fields of the state that the transformer takes in addition to latents, timestep and the branch's
    conditioning; a field with one row is expanded to all items.
    """

    needs: tuple[str, ...] = (
        "latents",
        "generators",
        "timesteps",
        "conditioning",
        "true_cfg_scale",
        "guidance_scale",
        "guidance_scale_2",
    )
    gives = ("latents",)
    phase = "denoise"
    uses = ("transformer",)

    def __init__(self, passes: Sequence[str] = ()) -> None:
        self.passes = tuple(passes)
        self.needs = (*Denoise.needs, *self.passes)

    def __call__(self, state: State, parts: Components, timings: Timings) -> None:
        shared = {name: expand_rows(getattr(state, name), len(state.latents)) for name in self.passes}
        conditioning = {branch: {**state.conditioning[branch], **shared} for branch in parts.guidance.branches(state)}
        scheduler = parts.pipeline.scheduler
        steps, noise = make_schedule(state.timesteps, parts.experts), make_noise_source(scheduler, state)
        rows = find_step_rows(parts.tables, steps, state.timesteps, conditioning)
        parts.cache.start(Schedule(steps), list(conditioning), parts.mesh)
        run = (
            steps
            if parts.warmup is None
            else select_first_steps(steps, parts.warmup, partial(find_step_kind, state, parts))
        )
        with parts.progress.phase("denoising", total=len(run)) as advance:
            for step in run:
                timestep = state.timesteps[step.index]
                start = timings.now()
                prediction = self.predict(state, parts, conditioning, timestep, step, rows.get(step.index))
                state.latents = scheduler.step(prediction, timestep, state.latents, return_dict=False, **noise)[0]
                timings.steps.append(timings.now() - start)
                advance()
        parts.cache.end()
        if not state.latents.isfinite().all():
            raise RunError(
                f"the latents are NaN or infinite after {len(run)} steps: the weights are damaged"
                f"{suggest_wider_dtype(parts.dtype)}"
            )

    def predict(
        self,
        state: State,
        parts: Components,
        conditioning: dict[str, dict[str, Any]],
        timestep: Tensor,
        step: Step,
        rows: dict[str, Tensor] | None,
    ) -> Tensor:
        """Return the guided prediction of one step, in the shape of the latents; `rows`: rows of modulation tables."""
        transformer = parts.transformer(step.expert)
        latents, times = state.latents.to(parts.dtype), timestep.expand(len(state.latents))
        if hasattr(scheduler := parts.pipeline.scheduler, "scale_model_input"):
            latents = scheduler.scale_model_input(latents, timestep)

        def predict(branches: Sequence[str]) -> dict[str, Tensor]:
            own = {branch: conditioning[branch] for branch in branches if branch != FEWER_BLOCKS}
            found = transformer(Inputs(latents, times, own, rows), step, parts.cache)
            if FEWER_BLOCKS in branches:
                again = Inputs(latents, times, {POSITIVE: conditioning[POSITIVE]}, rows, parts.guidance.layers)
                found[FEWER_BLOCKS] = transformer(again, step, NoCache())[POSITIVE]
            return {branch: found[branch] for branch in branches}

        axis = parts.mesh["cfg"] if parts.mesh else None
        predictions = predict_branches(find_branches(state, parts, step), predict, axis, latents)
        return parts.guidance.combine(predictions, find_scale(state, parts, step))


def find_scale(state: State, parts: Components, step: Step) -> float:
    """Return the guidance scale of a step."""
    return parts.guidance.scale_for(state, step.expert == LOW_NOISE, done=1 - step.timestep / 1000)


def find_branches(state: State, parts: Components, step: Step) -> tuple[str, ...]:
    """Return the predictions of a step, those of all ranks together."""
    branches = parts.guidance.branches_at(state, step.index)
    if parts.mesh and parts.mesh["cfg"]:
        return branches  # a rank without a branch would only wait, and HSDP may need its weights
    return parts.guidance.needed(branches, find_scale(state, parts, step))


def find_step_kind(state: State, parts: Components, step: Step) -> tuple[str, tuple[str, ...]]:
    """Return the expert and the predictions of a step: steps with equal ones do the same work."""
    return step.expert, find_branches(state, parts, step)


def suggest_wider_dtype(dtype: torch.dtype) -> str:
    """Return `, or bfloat16 is too narrow …`; "" for float32, the widest."""
    name = str(dtype).removeprefix("torch.")
    return "" if dtype is torch.float32 else f", or {name} is too narrow for this model; try dtype=float32"


def make_schedule(timesteps: Tensor, experts: Experts) -> tuple[Step, ...]:
    """Return each step with its index, timestep and expert."""
    values = timesteps.tolist()  # copied to the host once, not in each step
    return tuple(Step(index, value, experts.name_at(value)) for index, value in enumerate(values))


def make_noise_source(scheduler: Any, state: State) -> dict[str, Any]:
    """Return the keyword arguments that give a scheduler its noise; each run of the loop gets the same noise.

    A scheduler's Brownian motion is drawn on the CPU, so that it is the same on every device.
    """
    if "generator" not in inspect.signature(scheduler.step).parameters:
        return {}
    if hasattr(scheduler, "noise_sampler"):
        from diffusers.schedulers.scheduling_dpmsolver_sde import BrownianTreeNoiseSampler

        like, seeds = torch.empty_like(state.latents, device="cpu"), [one.initial_seed() for one in state.generators]
        ends = scheduler.config.sigma_min, scheduler.config.sigma_max
        scheduler.noise_sampler = BrownianTreeNoiseSampler(like, *ends, seed=seeds)
    return {"generator": [generator.clone_state() for generator in state.generators]}


def select_first_steps(steps: Sequence[Step], count: int, kind: Callable[[Step], Any]) -> list[Step]:
    """Return the first `count` steps of each kind, or all steps of a kind with fewer."""
    before = Counter[Any]()
    chosen = []
    for step in steps:
        before[kind(step)] += 1
        if before[kind(step)] <= count:
            chosen.append(step)
    return chosen


def expand_rows(value: Any, count: int) -> Any:
    """Expand a tensor with one row to `count` rows, without a copy; return anything else unchanged."""
    return value.expand(count, *value.shape[1:]) if isinstance(value, Tensor) else value
