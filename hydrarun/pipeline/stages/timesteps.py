"""The schedule of noise levels."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch

from hydrarun.core.errors import UsageError, is_host_memory_error
from hydrarun.core.timing import Timings
from hydrarun.pipeline.stage import Components, Stage
from hydrarun.pipeline.state import State


class PrepareTimesteps(Stage):
    """Sets the noise levels of the steps.

    `sigmas` selects their spacing: `linear` (evenly from 1 to 1 / steps), `scheduler` (the scheduler's own), or
    `linear_unless_flow` (linear, but the scheduler's own if it is set to `use_flow_sigmas`). A scheduler with
    `use_dynamic_shifting` also shifts them. `shift` selects by how much: on the scheduler's `line` by the number of
    latent tokens, or by the square `root` of (tokens of one frame / 256).
    Reference: diffusers' flow-matching pipelines (`calculate_shift`; Stable Diffusion 3, https://arxiv.org/abs/2403.03206).
    """

    needs = ("grid", "num_inference_steps")
    gives = ("timesteps",)
    phase = "encode"

    def __init__(
        self,
        sigmas: Literal["linear", "linear_unless_flow", "scheduler"] = "linear",
        shift: Literal["line", "root"] = "line",
    ) -> None:
        self.sigmas = sigmas
        self.shift = shift

    def __call__(self, state: State, parts: Components, timings: Timings) -> None:
        scheduler = parts.pipeline.scheduler
        with translate_schedule_errors(state, scheduler), np.errstate(invalid="ignore", over="ignore"):
            self.set_timesteps(scheduler, state, parts.device)
        if not scheduler.timesteps.isfinite().all():
            raise UsageError(describe_infinite_schedule(state, scheduler.config))
        # with the first step known, the scheduler never has to search for its position
        scheduler.set_begin_index(0)
        state.timesteps = scheduler.timesteps

    def set_timesteps(self, scheduler: Any, state: State, device: torch.device) -> None:
        """Set the scheduler's timesteps and noise levels."""
        accepted = inspect.signature(scheduler.set_timesteps).parameters
        own = self.sigmas == "scheduler" or (
            self.sigmas == "linear_unless_flow" and scheduler.config.get("use_flow_sigmas", False)
        )
        arguments: dict[str, Any] = {"device": device}
        if "mu" in accepted and scheduler.config.get("use_dynamic_shifting", False):
            arguments["mu"] = self.mu(scheduler.config, state.grid)
        if "sigmas" in accepted and not own:
            steps = state.num_inference_steps
            arguments["sigmas"] = np.linspace(1.0, 1 / steps, steps)
        else:
            arguments["num_inference_steps"] = state.num_inference_steps
        scheduler.set_timesteps(**arguments)

    def mu(self, config: Any, grid: Sequence[int]) -> float:
        """Return the scheduler's shift `mu` for a `grid` of frames, rows and columns of tokens."""
        tokens = math.prod(grid)
        return (tokens / grid[0] / 256) ** 0.5 if self.shift == "root" else compute_shift(config, tokens)


@contextmanager
def translate_schedule_errors(state: State, scheduler: Any) -> Iterator[None]:
    """Turn a scheduler's error about its settings into a one-line UsageError."""
    try:
        yield
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if is_host_memory_error(error):
            raise
        raise UsageError(
            f"sampling.num_inference_steps={state.num_inference_steps}: {type(scheduler).__name__} has no such schedule"
            f" with the settings of scheduler_config.json and `scheduler`: {str(error) or type(error).__name__}"
        ) from error


def describe_infinite_schedule(state: State, config: Any) -> str:
    """Return the message for noise levels that are not finite."""
    steps = state.num_inference_steps
    if steps == 1 and config.get("shift_terminal"):
        return (
            f"sampling.num_inference_steps={steps}: too few for this checkpoint's scheduler,"
            f" which stretches the schedule to end at {config.get('shift_terminal')}; use 2 or more"
        )
    return (
        f"sampling.num_inference_steps={steps}: the scheduler's noise levels are not finite: its shift is too large for"
        f" {math.prod(state.grid)} tokens; use a smaller picture, or another scheduler.shift"
    )


def compute_shift(config: Any, tokens: int) -> float:
    """Return the shift for `tokens` on the line through the scheduler's base and largest shift."""
    base, largest = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base_shift, max_shift = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    slope = (max_shift - base_shift) / (largest - base)
    return tokens * slope + (base_shift - slope * base)
