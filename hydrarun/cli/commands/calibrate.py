"""`hydrarun calibrate`: fits TeaCache's polynomial, or searches the steps of a mask, for a model and its settings.

The result is an option of the group `cache`. Heavy packages are imported only after the configuration is checked.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from hydrarun.cli.arguments import Arguments
from hydrarun.config import prompts as prompt_files
from hydrarun.config import targets
from hydrarun.config.checks import questions
from hydrarun.config.compose import ConfigOrigin, check_composed, compose_unchecked
from hydrarun.core.distributed.degrees import world_size
from hydrarun.core.errors import UsageError
from hydrarun.core.quoting import quote_overrides
from hydrarun.engine.calibration.job import CalibrationJob
from hydrarun.engine.ranks import launch
from hydrarun.outputs.run_folder import lock_folder

USAGE = """\
usage: hydrarun calibrate cache=teacache input.prompts=FILE [KEY=VALUE ...]
       hydrarun calibrate cache=mask cache.budget=0.5 input.prompts=FILE [KEY=VALUE ...]

Fits a cache to a model and its settings (model=..., sampling.num_inference_steps=..., ...), and writes it as an option.
  cache=teacache  draws every prompt with all steps computed, and fits the polynomial that maps the change of the
                  gate's signal to the change of the output. Writes DIR/cache/teacache_MODEL.yaml and a plot
  cache=mask      searches the steps to compute (cache.budget is their share of all steps) that keep the latents of
                  the prompts closest to those of the uncached run. Writes DIR/cache/mask_MODEL.yaml
                  cache.evaluations=200 limits the masks it tries; cache/predictor=taylor searches with that predictor
FILE has the prompts: .txt with one per line, or .csv or .jsonl with the single field `prompt`. Without FILE,
sampling.prompt is used. hydra.run.dir=DIR sets the output folder; a stopped search resumes from it.
Use the result with: hydrarun --config-dir DIR cache=teacache_MODEL ..."""

RUN_DIR = "hydra.run.dir"
BUDGET, EVALUATIONS = "cache.budget", "cache.evaluations"

#: settings of `calibrate` that are not part of the composed configuration
OWN = (RUN_DIR, BUDGET, EVALUATIONS)


def calibrate_cache(line: Arguments) -> int:
    """Calibrate a cache; return the exit code. Raises UsageError, and RunError from the runs."""
    own, overrides = split_settings(line.words)
    config, origin = compose_unchecked(quote_overrides(overrides))
    targets.check_targets(config, origin)
    is_mask = check_cache(config, own)
    prompts = choose_prompts(config, origin)
    job = CalibrationJob(
        make_uncached_config(config, origin, prompts),
        config["cache"],
        prompts,
        Path(own.get(RUN_DIR, f"outputs/{datetime.now():%Y-%m-%d/%H-%M-%S-%f}-calibrate")),
        list_run_overrides(overrides, prompts[0]),
        parse_budget(own[BUDGET]) if is_mask else 1.0,
        parse_evaluations(own.get(EVALUATIONS, "200")),
    )
    with lock_folder(job.folder):
        # these import torch, so they come after the checks
        if is_mask:
            from hydrarun.engine.calibration import mask

            file = mask.calibrate_mask(job)
        else:
            from hydrarun.engine.calibration import teacache

            file = teacache.calibrate_teacache(job)
    print(f"\n{file}\n{job.command(file)}")
    return 0


def split_settings(words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Return calibrate's own settings by key, and the other overrides."""
    own: dict[str, str] = {}
    overrides: list[str] = []
    for word in words:
        key, _, value = word.partition("=")
        if key in OWN:
            own[key] = value
        else:
            overrides.append(word)
    return own, overrides


def check_cache(config: dict[str, Any], own: dict[str, str]) -> bool:
    """Return True for a mask, False for TeaCache. Raises UsageError for other caches, or settings of the other one."""
    is_mask = questions.uses_gate(config, "Mask")
    if not (is_mask or questions.uses_gate(config, "TeaCache")):
        raise UsageError(
            "calibrate: choose cache=teacache, whose polynomial it fits, or cache=mask, whose steps it searches"
        )
    if not is_mask:
        for key in sorted({BUDGET, EVALUATIONS} & own.keys()):
            raise UsageError(f"{key}: a setting of calibrate for cache=mask; cache=teacache has none of its own")
    elif config["cache"]["gate"]["steps"] is not None:
        raise UsageError("cache.gate.steps: calibrate searches them; leave them out")
    elif BUDGET not in own:
        raise UsageError(f"{BUDGET} is missing: the share of steps that may be computed, {BUDGET}=0.5")
    return is_mask


def choose_prompts(config: dict[str, Any], origin: ConfigOrigin) -> list[str]:
    """Return the prompts of `input.prompts`, or else of `sampling.prompt`. Raises UsageError if both are given."""
    file, given = config["input"]["prompts"], config["sampling"]["prompt"]
    if file is None:
        return given if isinstance(given, list) and given else [given]
    if origin("sampling.prompt") == "command line":
        raise UsageError("input.prompts and sampling.prompt are both given: leave one out")
    return prompt_files.read_prompt_texts(file)


def make_uncached_config(config: dict[str, Any], origin: ConfigOrigin, prompts: Sequence[str]) -> dict[str, Any]:
    """Return the checked configuration without a cache and with the longest prompt. Raises UsageError."""
    longest = max(prompts, key=lambda prompt: len(str(prompt)))
    changed = {
        **config,
        "sampling": {**config["sampling"], "prompt": longest},
        "input": {**config["input"], "prompts": None},
        "cache": compose_unchecked(["cache=none"])[0]["cache"],
    }
    check_composed(changed, origin)
    launch.check_rank_count(config)
    if config["warmup"]:
        raise UsageError("warmup: calibrate measures no times; leave it out")
    if world_size(config["parallel"]) > 1:
        raise UsageError("parallel: calibrate in one process (parallel=none); the result holds for any layout")
    return changed


def parse_budget(text: str) -> float:
    """Parse `cache.budget`, a share of the steps. Raises UsageError."""
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not 0 < share < 1:
        raise UsageError(f"{BUDGET}={text}: not a share of the steps, above 0 and below 1: {BUDGET}=0.5")
    return share


def parse_evaluations(text: str) -> int:
    """Parse `cache.evaluations`, a whole number >= 1. Raises UsageError."""
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise UsageError(f"{EVALUATIONS}={text}: not a whole number >= 1")
    return int(text)


def list_run_overrides(overrides: Sequence[str], prompt: str) -> list[str]:
    """Return the overrides of a run with the result: no calibration settings, and a prompt if a file had it."""
    kept = [word for word in overrides if not re.match(r"\+*(cache|input\.prompts)\b", word)]
    from_file = any(word.startswith("input.prompts=") for word in overrides)
    return [*kept, f"sampling.prompt={prompt}"] if from_file else kept
