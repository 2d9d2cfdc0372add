"""Reads the numbers of a run that a sweeper optimizes (`report.objectives`)."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from hydrarun.config.checks.report import PAIRED


def read_objectives(record: dict[str, Any], objectives: Sequence[str]) -> float | list[float]:
    """Return the values of the objectives in run.json; a single one as a plain number, as Optuna's sweeper needs it."""
    found = [read_objective(record, name) for name in objectives]
    return found[0] if len(found) == 1 else found


def read_objective(record: dict[str, Any], name: str) -> float:
    """Return one objective: a name of `MEASURED` or `METRICS` in `hydrarun.config.checks.report`."""
    if name == "steady_step_s":
        steps = record["timings"]["steps_s"]
        return statistics.median(steps[1:] or steps)  # the first step includes one-time costs
    if name == "accuracy":
        return record["quality"][name]["outputs"]
    if name in PAIRED:
        return record["quality"][name]["mean"]
    return record["memory" if name.startswith("peak_") else "timings"][name]
