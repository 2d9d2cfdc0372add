"""Fits TeaCache's polynomial: predicts the change of the output from that of the first block's modulated input."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hydrarun.acceleration.cache.base import Owner
from hydrarun.acceleration.cache.recorder import RecordingCache
from hydrarun.core.errors import UsageError
from hydrarun.core.progress import Progress
from hydrarun.core.tables import Table, format_plain
from hydrarun.engine.calibration.plot import Panel, draw_fit
from hydrarun.engine.calibration.trial import TrialRunner, format_entry, format_prompt_count, write_option

if TYPE_CHECKING:
    from hydrarun.engine.calibration.job import CalibrationJob

DEGREE = 4

#: warn below this number of pairs
FEW = 100

#: warn below this correlation of fitted and measured changes
POOR = 0.5

Pairs = Mapping[Owner, Sequence[tuple[float, float]]]
Coefficients = dict[str, list[float]]


def calibrate_teacache(job: CalibrationJob) -> Path:
    """Record, fit, print a report, write the option and return its file. Raises UsageError for too few steps to fit."""
    draws = TrialRunner(job.config, Progress())
    pairs = record_changes(draws, job.prompts)
    coefficients = fit_polynomials(pairs)
    print(format_plain(make_fit_table(pairs, coefficients)))
    found = list(list_warnings(pairs, coefficients))
    for line in found:
        print(f"warning: {line}")
    file = job.option("teacache")
    write_teacache_option(file, collect_facts(job, draws.runner.collect_facts(), pairs), coefficients, found)
    plot_pairs(job.folder / f"{file.stem}.svg", pairs, coefficients)
    return file


def record_changes(draws: TrialRunner, prompts: Sequence[str]) -> Pairs:
    """Record the changes from step to step in uncached runs of the prompts."""
    recording = RecordingCache()
    with draws.progress.phase("recording", total=len(prompts)) as advance:
        for index, prompt in enumerate(prompts):
            draws.denoise(draws.prepare(prompt), recording)
            if index == 0:  # every prompt gives the same number
                check_pair_count(recording, draws, len(prompts))
            advance()
    return recording.pairs


def check_pair_count(recording: RecordingCache, draws: TrialRunner, prompts: int) -> None:
    """Raise UsageError if `prompts` times the pairs of the first prompt are too few to fit some expert."""
    for expert in draws.parts.experts.transformers:
        count = prompts * sum(len(found) for owner, found in recording.pairs.items() if owner[0] == expert)
        if count <= DEGREE:
            raise UsageError(
                f"calibrate: {expert} gives {count} pairs of consecutive steps, but a fit needs {DEGREE + 1}:"
                " use more prompts, or more sampling.num_inference_steps"
            )


def select_expert_pairs(pairs: Pairs, expert: str) -> np.ndarray:
    """Return all pairs of an expert, `[N, 2]`."""
    return np.array([pair for owner, found in pairs.items() if owner[0] == expert for pair in found])


def fit_polynomials(pairs: Pairs) -> Coefficients:
    """Fit each expert's least-squares polynomial to the pairs of all its branches, highest power first."""
    coefficients = {}
    for expert in dict.fromkeys(expert for expert, _ in pairs):
        x, y = select_expert_pairs(pairs, expert).T
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # RankWarning: `list_warnings` checks the result
            coefficients[expert] = [float(value) for value in np.polyfit(x, y, DEGREE)]
    return coefficients


@dataclass(frozen=True)
class FitQuality:
    """How well a polynomial predicts the changes: correlation with the measured ones, and explained variance."""

    correlation: float
    r_squared: float


def measure_fit(found: Sequence[tuple[float, float]], coefficients: Sequence[float]) -> FitQuality:
    """Measure the fit of one branch's pairs. 0 where nothing varies."""
    x, y = np.array(found).T
    predicted = np.polyval(coefficients, x)
    if not (y.std() and predicted.std()):
        return FitQuality(0.0, 0.0)
    return FitQuality(float(np.corrcoef(predicted, y)[0, 1]), float(1 - np.square(y - predicted).mean() / y.var()))


def make_fit_table(pairs: Pairs, coefficients: Coefficients) -> Table:
    """Return a table of the recorded pairs and their fit, for the user."""
    rows = []
    for (expert, branch), found in pairs.items():
        x, y = np.array(found).T
        how = measure_fit(found, coefficients[expert])
        ranges = (f"{values.min():.4g} to {values.max():.4g}" for values in (x, y))
        rows.append((expert, branch, str(len(found)), *ranges, f"{how.correlation:.3f}", f"{how.r_squared:.3f}"))
    header = ("expert", "branch", "pairs", "change of signal", "change of output", "correlation", "R²")
    return Table("fit", header, rows)


def list_warnings(pairs: Pairs, coefficients: Coefficients) -> Iterator[str]:
    """Yield warnings about the fit, for the user."""
    for (expert, branch), found in pairs.items():
        if len(found) < FEW:
            yield f"{expert}, {branch}: {len(found)} pairs; {FEW} or more make a fit that holds for other prompts"
        correlation = measure_fit(found, coefficients[expert]).correlation
        if correlation < POOR:
            yield f"{expert}, {branch}: correlation {correlation:.2f}: the signal barely predicts the output's change"
    for expert, polynomial in coefficients.items():
        yield from _check_shape(expert, polynomial, select_expert_pairs(pairs, expert))


def _check_shape(expert: str, polynomial: Sequence[float], points: np.ndarray) -> Iterator[str]:
    """Yield warnings about a polynomial that leaves the range of its data, or falls."""
    x, y = points.T
    at = np.linspace(x.min(), x.max(), 201)
    curve = np.polyval(polynomial, at)
    largest = max(map(abs, polynomial))
    if curve.min() < 0 or curve.max() > 2 * y.max():
        yield (
            f"{expert}: the polynomial runs from {curve.min():.3g} to {curve.max():.3g} where the output changes by"
            f" {y.min():.3g} to {y.max():.3g}; its largest coefficient is {largest:.3g}: draw more, and other, prompts"
        )
    falls = float(np.mean(np.diff(curve) < 0))
    if falls:
        yield (
            f"{expert}: the polynomial falls on {falls:.0%} of its range: there a larger change of the signal counts as"
            " a smaller one of the output"
        )


def collect_facts(job: CalibrationJob, used: Mapping[str, Any], pairs: Pairs) -> dict[str, Any]:
    """Return what the coefficients are valid for, by the fields of `schema.TeaCacheFit`. `used`: the runner's facts."""
    count = job.config["sampling"]["num_inference_steps"]
    return {
        "model": job.config["model"]["name"],
        "revision": used["weights"]["revision"],
        "weights": used["weights"]["fingerprint"],
        "scheduler": used["scheduler"],
        "num_inference_steps": [count, count],
        "source": f"hydrarun calibrate, {format_prompt_count(job.prompts)}, {sum(map(len, pairs.values()))} pairs",
    }


def write_teacache_option(
    file: Path, facts: Mapping[str, Any], coefficients: Coefficients, found: Sequence[str]
) -> None:
    """Write the option. `facts`: from `collect_facts`; `found`: from `list_warnings`."""
    rounded = {expert: [float(f"{value:.9g}") for value in values] for expert, values in coefficients.items()}
    fields = {
        "model": ("the model it is for, by its name; another is refused", facts["model"]),
        "coefficients": ("each expert's polynomial, highest power first", rounded),
        "revision": ("commit of the hub's repository; null: the weights are a folder's", facts["revision"]),
        "weights": ("fingerprint of the weights; others are refused", facts["weights"]),
        "scheduler": ("the scheduler's class; another is refused", facts["scheduler"]),
        "num_inference_steps": ("least and most steps; other numbers are refused", facts["num_inference_steps"]),
        "source": ("what it was fitted on", facts["source"]),
    }
    lines = [line for key, (comment, value) in fields.items() for line in format_entry(comment, key, value, indent=4)]
    steps = facts["num_inference_steps"][0]
    about = f"TeaCache with the coefficients of {facts['model']} at {steps} steps, fitted by hydrarun calibrate"
    warned = [f"  # warning: {line}" for line in found]
    write_option(file, about, ["teacache"], ["gate:", *warned, "  # the fitted polynomial", "  fit:", *lines])


def plot_pairs(file: Path, pairs: Pairs, coefficients: Coefficients) -> None:
    """Draw the pairs, coloured by branch, and the polynomial of each expert, as an SVG."""
    panels = []
    for expert, polynomial in coefficients.items():
        x = select_expert_pairs(pairs, expert)[:, 0]
        at = np.linspace(x.min(), x.max(), 201)
        curve = list(zip(at.tolist(), np.polyval(polynomial, at).tolist(), strict=True))
        panels.append(
            Panel(expert, {branch: found for (owner, branch), found in pairs.items() if owner == expert}, curve)
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(draw_fit(panels, DEGREE), encoding="utf-8")
