"""Tries a run's schedule of noise levels before weights are read: not every scheduler has one for every request."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import diffusers
import torch

from hydrarun.config.checks.checkpoint import read_json, read_vae_factors
from hydrarun.core.errors import UsageError
from hydrarun.core.timing import Timings
from hydrarun.models.layers.tokens import Grid
from hydrarun.pipeline.request import make_state
from hydrarun.pipeline.schedulers import CLASS_NAME
from hydrarun.pipeline.stage import Components, Stage
from hydrarun.pipeline.stages.timesteps import PrepareTimesteps

#: tokens per side of a picture whose size is taken from an input image
UNKNOWN_SIDE = 64

#: steps that are tried; settings fail in the first or in the last ones, and a longer schedule takes time
MAX_STEPS = 200


def check_schedules(
    config: dict[str, Any], stages: Sequence[Stage], scheduler: Any | None, saved: Mapping[str, Any], folder: Path
) -> None:
    """Raise UsageError if the scheduler has no schedule for the request of `config`.

    `scheduler`: that of the run; None: the checkpoint's own, which `saved` describes. `folder`: the checkpoint. The
    lines of `input.prompts` may each have another request, which only the driver reads: they are not tried.
    """
    tried = scheduler or make_own_scheduler(saved)
    if tried is None or config["input"]["prompts"] is not None:
        return
    device = torch.device("cpu")
    state = make_state(config["sampling"])
    state.grid = estimate_grid(config, folder)
    for stage in stages:
        if isinstance(stage, PrepareTimesteps):
            parts = SimpleNamespace(pipeline=SimpleNamespace(scheduler=copy.deepcopy(tried)), device=device)
            stage(state, cast(Components, parts), Timings(device))
            try_steps(parts.pipeline.scheduler)


def try_steps(scheduler: Any) -> None:
    """Step a scheduler through its schedule with small latents. Raises UsageError for settings with which it fails.

    Restores torch's random numbers, which some schedulers draw.
    """
    latents = torch.zeros(1, 4, 8, 8)
    with torch.random.fork_rng(devices=[]):
        try:
            for timestep in scheduler.timesteps[:MAX_STEPS]:
                latents = scheduler.step(latents, timestep, latents, return_dict=False)[0]
        except Exception as error:  # diffusers' schedulers raise nearly anything
            raise UsageError(
                f"scheduler: {type(scheduler).__name__} cannot step with these settings:"
                f" {str(error).splitlines()[0] if str(error) else type(error).__name__}"
            ) from error


def make_own_scheduler(saved: Mapping[str, Any]) -> Any | None:
    """Return the checkpoint's own scheduler; None for a damaged one, which loading it reports."""
    with suppress(Exception):
        cls = getattr(diffusers, str(saved[CLASS_NAME]))
        return cls.from_config({key: value for key, value in saved.items() if key != CLASS_NAME})
    return None


def estimate_grid(config: Mapping[str, Any], folder: Path) -> Grid:
    """Return the frames, rows and columns of tokens of a request, from the checkpoint's JSON files alone."""
    vae, transformer = (read_json(folder / name / "config.json") for name in ("vae", "transformer"))
    if "sample_size" in transformer and "sampling_rate" in vae:
        return (1, 1, transformer["sample_size"])
    frames, side = read_vae_factors(vae)
    pixels, sampling = (side or 1) * config["model"]["patch_size"], config["sampling"]
    rows, columns = ((sampling[name] or UNKNOWN_SIDE * pixels) // pixels for name in ("height", "width"))
    return ((sampling["num_frames"] or 1) - 1) // (frames or 1) + 1, rows, columns
