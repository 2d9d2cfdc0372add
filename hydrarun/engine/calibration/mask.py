"""Searches the mask of computed steps whose latents are nearest to those of uncached runs of the prompts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hydrarun.acceleration.cache.base import NoCache, Schedule
from hydrarun.config.targets import instantiate
from hydrarun.core.errors import UsageError
from hydrarun.core.moved_names import use_original_names
from hydrarun.core.progress import Progress
from hydrarun.core.resources import read_options
from hydrarun.engine.calibration.scores import ScoreLedger
from hydrarun.engine.calibration.search import SearchResult, Steps, search_steps, spread_steps
from hydrarun.engine.calibration.trial import TrialRunner, format_entry, format_prompt_count, write_option
from hydrarun.outputs.media import kinds
from hydrarun.outputs.quality.metrics import compare_outputs
from hydrarun.pipeline.stages.denoise import make_schedule
from hydrarun.pipeline.state import State

if TYPE_CHECKING:
    from hydrarun.engine.calibration.job import CalibrationJob

#: the spacings that a search starts from: even, as every_n's, and denser at the start, as SCM's
POWERS = (1.0, 1.5, 2.0)


def calibrate_mask(job: CalibrationJob) -> Path:
    """Search a mask, print a report, write the option and return its file. Raises UsageError."""
    instantiate(make_cache_node(job, (0,)), "cache")  # raises for an invalid node before the model is loaded
    progress = Progress()
    references = ReferenceRuns(job, TrialRunner(job.config, progress))
    ledger = ScoreLedger(job.folder / "scores.jsonl", make_identity(job, references))
    starts = [spread_steps(references.count, references.steps, references.firsts, power) for power in POWERS]
    with progress.phase("searching", total=job.evaluations) as advance:

        def score(steps: Steps) -> float:
            if steps not in ledger.scores:
                ledger.add(steps, references.score(steps))
            advance()
            return ledger.scores[steps]

        found = search_steps(score, starts, references.steps, references.firsts, job.evaluations)
    near = {steps: references.nearness(steps) for steps in dict.fromkeys([found.start, found.best])}
    print(format_report(found, near, job, references))
    file = job.option("mask")
    write_mask_option(file, job, references, found, near[found.best])
    return file


class ReferenceRuns:
    """The prepared prompts and their uncached runs."""

    def __init__(self, job: CalibrationJob, draws: TrialRunner) -> None:
        """Draw the uncached runs. Raises UsageError for a budget that leaves nothing to search."""
        self.job, self.draws = job, draws
        self.prepared: list[State] = []
        self.uncached: list[State] = []
        with draws.progress.phase("uncached runs", total=len(job.prompts)) as advance:
            for prompt in job.prompts:
                self.prepared.append(draws.prepare(prompt))
                self.uncached.append(draws.denoise(self.prepared[-1], NoCache()))
                if len(self.uncached) == 1:
                    self._plan()
                advance()

    def _plan(self) -> None:
        """Set the number of steps, the number of computed ones, and the steps that must be computed."""
        whole = Schedule(make_schedule(self.uncached[0].timesteps, self.draws.parts.experts))
        self.steps, self.firsts = len(whole.steps), whole.firsts
        self.count = round(self.job.budget * self.steps)
        if not len(self.firsts) <= self.count < self.steps:
            raise UsageError(
                f"cache.budget={self.job.budget}: {self.count} of {self.steps} steps; the computed ones are at least"
                f" {len(self.firsts)} (the first step of each expert) and at most {self.steps - 1}"
            )

    def denoise(self, index: int, steps: Steps) -> State:
        """Denoise a prompt with these steps computed."""
        return self.draws.denoise(self.prepared[index], instantiate(make_cache_node(self.job, steps), "cache"))

    def score(self, steps: Steps) -> float:
        """Return the mean squared error of the latents, over all prompts."""
        errors = [
            (self.denoise(index, steps).latents.float() - reference.latents.float()).square().mean().item()
            for index, reference in enumerate(self.uncached)
        ]
        return sum(errors) / len(errors)

    def nearness(self, steps: Steps) -> str:
        """Format the mean PSNR in dB over all outputs; for sounds SNR."""
        measure = kinds.find_model_kind(self.job.config["model"]).metrics[0]
        pairs = [
            pair
            for index, reference in enumerate(self.uncached)
            for pair in zip(self.draws.decode(self.denoise(index, steps)), self.draws.decode(reference), strict=True)
        ]
        decibels = float(np.mean([compare_outputs(*pair, [measure])[measure] for pair in pairs]))
        return f"{measure.upper()} {decibels:.2f} dB"


def make_cache_node(job: CalibrationJob, steps: Steps) -> dict[str, Any]:
    """Return the cache node with these steps computed."""
    return {**job.cache, "gate": {**job.cache["gate"], "steps": list(steps), "density": None}}


def make_identity(job: CalibrationJob, references: ReferenceRuns) -> dict[str, Any]:
    """Return what a score depends on, except the steps. Equal in every version, so that an older search continues."""
    facts = references.draws.runner.collect_facts()
    known = {
        **{key: job.config[key] for key in ("model", "sampling", "input", "compile", "quantization")},
        **{key: facts[key] for key in ("weights", "device", "dtype", "attention", "scheduler")},
        "prompts": job.prompts,
        "predictor": job.cache["predictor"],
        "computed steps": references.count,
        **({"scheduler settings": job.config["scheduler"]} if job.config["scheduler"] else {}),
    }
    return use_original_names(known)


def format_report(found: SearchResult, near: dict[Steps, str], job: CalibrationJob, references: ReferenceRuns) -> str:
    """Format the result of the search for the user."""
    at_limit = found.count >= job.evaluations
    why = "cache.evaluations is reached" if at_limit else "no move of a single step is better"
    rows = (("start", found.start, found.start_score), ("best", found.best, found.best_score))
    lines = [
        f"{name}: latents' mean squared error {score:.4g}, {near[steps]}, computed {list(steps)}"
        for name, steps, score in rows
    ]
    masks = f"{found.count} masks of {references.count} of {references.steps} steps"
    return "\n".join([*lines, f"{masks} tried on {format_prompt_count(job.prompts)}: {why}"])


def write_mask_option(
    file: Path, job: CalibrationJob, references: ReferenceRuns, found: SearchResult, near: str
) -> None:
    """Write the option of the mask."""
    name = job.config["model"]["name"]
    about = (
        f"{references.count} of {references.steps} steps of {name} (budget {job.budget}), searched by hydrarun"
        f" calibrate on {format_prompt_count(job.prompts)}: latents' mean squared error {found.best_score:.4g}, {near}"
    )
    predictor, body = format_predictor(job.cache["predictor"])
    steps = format_entry("steps that are computed, from 0", "steps", list(found.best), indent=2)
    density = format_entry("null: by steps", "density", None, indent=2)
    count = job.config["sampling"]["num_inference_steps"]
    run = format_entry("the run that they are for; others are refused", "num_inference_steps", count, indent=2)
    write_option(file, about, ["mask", *predictor], ["gate:", *steps, *run, *density, *body])


def format_predictor(predictor: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Return the entry of the defaults list and the fields that make this predictor."""
    shipped = read_options("cache/predictor")
    names = [name for name, option in shipped.items() if option["_target_"] == predictor["_target_"]]
    base = shipped[names[0]] if names else {}
    other = {key: value for key, value in predictor.items() if base.get(key) != value}
    body = format_entry("what replaces the blocks of a skipped step", "predictor", other, indent=0) if other else []
    return [f"override predictor: {name}" for name in names[:1]], body
