"""Runs one point of a sweep. Hydra's launchers may send it to another process or another machine."""

from __future__ import annotations

import atexit
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from hydrarun.cli.sweep.objectives import read_objectives
from hydrarun.cli.sweep.space import BASIC
from hydrarun.config import batches, targets
from hydrarun.config.compose import check_composed, split_composed, to_plain_config
from hydrarun.core.errors import RunError, report_error
from hydrarun.core.printable import make_printable
from hydrarun.engine.ranks import launch
from hydrarun.outputs.failure_record import record_failure
from hydrarun.outputs.run_folder import claim_run_folder


class PointFailedError(RunError):
    """Reports a failed point to a searching sweeper. The reason is printed before this is raised."""


class SweepStopped(BaseException):
    """Stops the sweep after a failed point (`--fail-fast`)."""


def run_point(allowed: Sequence[str], fail_fast: bool, composed: DictConfig) -> Any:
    """Run a point; return its values for `report.objectives`: None, a number or a list.

    `allowed`: classes that the user allows with `--allow-target`. A failure is printed and recorded in the
    folder of the point. Raises SweepStopped for it with `fail_fast`, and PointFailedError if there are objectives.
    """
    for name in allowed:
        targets.allow_target(name)
    if HydraConfig.get().runtime.choices["hydra/launcher"] != BASIC:
        _close_at_exit()
    objectives = list(composed.report.objectives)
    try:
        record = run_composed(composed)
    except Exception as error:
        report_error(error)
        if fail_fast:
            raise SweepStopped from None
        if objectives:
            raise PointFailedError("the point failed") from None
        return None
    return read_objectives(record, objectives) if objectives else None


def run_composed(composed: DictConfig) -> dict[str, Any]:
    """Run a configuration from Hydra in its output directory; return run.json. Raises UsageError and RunError."""
    settings = HydraConfig.get()
    folder = Path(settings.runtime.output_dir)
    print(make_printable(f"[{settings.job.num}] {' '.join(settings.overrides.task)}"), file=sys.stderr)
    plain = to_plain_config(composed)
    with claim_run_folder(folder, batches.is_batch_run(plain), "hydra.sweep.dir"), record_failure(plain, folder):
        config, origin = split_composed(composed, settings)
        config = check_composed(config, origin)
        origin.print_notes(config)
        return launch.run_configuration(config, folder)


@cache
def _close_at_exit() -> None:
    """Close the executor at exit, in a launcher's process that keeps the loaded model from point to point."""
    atexit.register(launch.close_executor)
