"""The numbers of a run that a sweeper searches by (`report.objectives`)."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from hydrarun.config.checks.report import PAIRED


def read_objectives(record: dict[str, Any], objectives: Sequence[str]) -> float | list[float]:
    """What run.json says of them; a single one is a plain number, as Optuna's sweeper wants it."""
    found = [read_objective(record, name) for name in objectives]
    return found[0] if len(found) == 1 else found


def read_objective(record: dict[str, Any], name: str) -> float:
    """One of `hydrarun.config.checks.report.OBJECTIVES`."""
    if name == "steady_step_s":
        steps = record["timings"]["steps_s"]
        return statistics.median(steps[1:] or steps)  # the first pays for what happens once
    if name == "accuracy":
        return record["quality"][name]["outputs"]
    if name in PAIRED:
        return record["quality"][name]["mean"]
    return record["memory" if name.startswith("peak_") else "timings"][name]
