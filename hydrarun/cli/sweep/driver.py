"""Runs a sweep: passes its points to Hydra, lists the failed ones at the end and writes the report."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from hydra.core.override_parser.types import Quote, QuotedString

from hydrarun.cli.sweep import order, point
from hydrarun.cli.sweep.space import BASIC, Sweep, read_sweep
from hydrarun.config import batches, targets
from hydrarun.config.hydra_main import check_written_files, run_with_hydra
from hydrarun.core.errors import UsageError, report_error
from hydrarun.core.printable import make_printable
from hydrarun.core.quoting import escape_interpolation
from hydrarun.outputs import report
from hydrarun.outputs.failure_record import Stamp, get_file_stamp
from hydrarun.outputs.report import collect
from hydrarun.outputs.report.collect import Point
from hydrarun.outputs.run_folder import RECORD_FILE, check_run_folder, lock_folder

PLACE = "hydra.sweep.dir"


def run_sweep(overrides: list[str], flags: list[str], fail_fast: bool) -> int:
    """Run a sweep of quoted overrides; return the highest exit code of its points. Raises UsageError.

    `fail_fast`: stop at the first failed point.
    """
    words = [*overrides, *choose_sweep_dir(overrides)]
    sweep = read_sweep(words, flags)
    for note in order.describe_reorder(words, sweep.overrides):
        print(note, file=sys.stderr)
    check_objectives(sweep, fail_fast)
    for folder in sorted(path for path in sweep.folder.glob("*") if path.is_dir()):
        check_written_files(PLACE, folder)
    task = partial(point.run_point, targets.list_user_allowed(), fail_fast)
    words = [*sweep.overrides, *make_shared_overrides(sweep)]
    words += ["fail_fast=true"] if fail_fast and batches.is_batch_run(sweep.shared) else []
    enough = False
    with lock_folder(sweep.folder, PLACE):
        before = read_stamps(sweep.folder)
        for folder in sorted(before):
            check_run_folder(folder, resumes_batches(sweep), PLACE)
        try:
            run_with_hydra(task, words, flags)
        except point.PointFailedError:
            pass  # Optuna's sweeper stops after too many failures, which are printed already
        except point.SweepStopped:
            enough = True
        finally:
            ended = finish_sweep(sweep, before)
    return max([0 if enough else check_missing_points(sweep, ended), *map(get_point_code, ended)])


def choose_sweep_dir(overrides: Sequence[str]) -> list[str]:
    """Return the override for the default folder of an `input.prompts` sweep: always the same, so that it resumes."""
    keys = {order.parse_key(one) for one in overrides}
    if "input.prompts" not in keys or PLACE in keys:
        return []
    digest = hashlib.sha256(json.dumps(sorted(overrides)).encode(errors="surrogatepass")).hexdigest()[:8]
    return [f"{PLACE}=outputs/prompts-{digest}-sweep"]


def resumes_batches(sweep: Sweep) -> bool:
    """Return whether points may be batches, which continue what their folders hold."""
    swept = order.list_swept_keys(sweep.overrides)
    return batches.is_batch_run(sweep.shared) or bool({"input.prompts", "batch_size"} & {*swept})


def finish_sweep(sweep: Sweep, before: dict[Path, Stamp | None]) -> list[Point]:
    """List the failed points and write the report, also after Ctrl-C. Return the points that ran."""
    places = [place for place, seen in read_stamps(sweep.folder).items() if before.get(place) != seen]
    ended = sorted(
        (collect.read_point(sweep.folder, place) for place in places),
        key=lambda one: collect.natural_sort_key(one.name),
    )
    failed = [one for one in ended if get_point_code(one) and one.status != "interrupted"]
    if failed:
        count = len(ended) if sweep.points is None else len(sweep.points)
        print(f"{len(failed)} of {count} point{'' if count == 1 else 's'} failed:", file=sys.stderr)
        for one in failed:
            text = f"  {format_point_name(sweep, one)}: {shorten_error(one.error or '')}"
            print(make_printable(text), file=sys.stderr)
    if ended:
        write_sweep_report(sweep.folder)
    return ended


def write_sweep_report(folder: Path) -> None:
    """Write the report. Print an error instead of raising it, so that the result of the sweep stays."""
    try:
        print(f"report: {report.write_report(folder)}", file=sys.stderr)
    except Exception as error:
        print("the report could not be written:", file=sys.stderr)
        report_error(error)


def get_point_code(point: Point) -> int:
    """Return the exit code that `cli.main` gives for a single run with this result."""
    if point.status == "complete":
        return 0
    return 2 if collect.get_value(point.record, "error", "type", kind=str) == UsageError.__name__ else 1


def format_point_name(sweep: Sweep, point: Point) -> str:
    """Return the folder of a point with its swept overrides."""
    swept = order.list_swept_keys(sweep.overrides)
    own = [one for one in point.overrides or () if order.parse_key(one) in swept]
    return f"{point.name} ({' '.join(own)})" if own else point.name


def shorten_error(error: str) -> str:
    """Return one line of an error: the last line of a traceback, otherwise the first line."""
    lines = error.strip().splitlines() or [""]
    return lines[-1 if lines[0].startswith("Traceback") else 0]


def check_missing_points(sweep: Sweep, ended: Sequence[Point]) -> int:
    """Print a line and return 1 if points left no run.json in the sweep's folder; otherwise return 0."""
    lost = len(sweep.points or []) - len(ended)
    if lost <= 0 and ended:
        return 0
    many = f"{lost} of {len(sweep.points)} points" if sweep.points else "the points"
    print(f"{many} left no run.json in {sweep.folder}: do all machines share that folder?", file=sys.stderr)
    return 1


def check_objectives(sweep: Sweep, fail_fast: bool) -> None:
    """Raise UsageError for objectives that no sweeper reads, or whose number differs from the sweeper's directions.

    Also raises it for `fail_fast` with a launcher that runs points in parallel.
    """
    if fail_fast and sweep.engine("launcher") != BASIC:
        raise UsageError(f"--fail-fast: hydra/launcher={sweep.engine('launcher')} runs points in parallel")
    objectives, sweeper = list(sweep.shared.report.objectives), sweep.engine("sweeper")
    _ = sweep.points  # raises for values that cannot be swept
    if sweeper == BASIC and objectives:
        raise UsageError("report.objectives: for a sweeper that searches: add hydra/sweeper=optuna, or leave it out")
    if sweeper == "optuna":
        direction = sweep.shared.hydra.sweeper.direction
        wanted = 1 if isinstance(direction, str) or not hasattr(direction, "__len__") else len(direction)
        if len(objectives) != wanted:
            raise UsageError(
                f"report.objectives has {len(objectives)}, and hydra.sweeper.direction {wanted}: give each objective "
                "its direction: 'report.objectives=[denoise_s,psnr]' 'hydra.sweeper.direction=[minimize,maximize]'"
            )


def make_shared_overrides(sweep: Sweep) -> list[str]:
    """Return overrides for every process that runs points: the absolute sweep folder, and reuse of Ray workers."""
    folder = QuotedString(escape_interpolation(str(sweep.folder)), Quote.double).with_quotes()
    words = [f"hydra.sweep.dir={folder}"]
    if sweep.engine("launcher") == "ray":
        remote = sweep.shared.hydra.launcher.ray.remote
        if remote.get("num_gpus") and "max_calls" not in remote:
            print("ray: max_calls=0: a worker keeps what it has loaded for its next point", file=sys.stderr)
            words.append("+hydra.launcher.ray.remote.max_calls=0")
    return words


def read_stamps(folder: Path) -> dict[Path, Stamp | None]:
    """Return the folders of the points, with the file stamps of their records."""
    return {place: get_file_stamp(place / RECORD_FILE) for place in collect.find_run_folders(folder)}
