"""Reads run folders as points. A run.json may be incomplete, damaged or untrusted: an unreadable one gives a point with
an error, not an exception."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydrarun.core.errors import UsageError
from hydrarun.core.files import read_file
from hydrarun.core.moved_names import use_current_names
from hydrarun.core.strict_json import CONSTANTS, read_json
from hydrarun.core.strict_yaml import parse_yaml
from hydrarun.outputs.run_folder import RECORD_FILE

FORMAT = 1  # of the run.json files that this module reads

MAX_BYTES = 64 * 2**20  # of one run.json
MAX_OVERRIDES = 2**20  # bytes of one record of a command line

OVERRIDES = ".hydra/overrides.yaml"

MOST = 1e300  # numbers this large are treated as missing

UNFINISHED = "no run.json: it was killed, or it is still running"


@dataclass(frozen=True)
class Output:
    """A picture, video or sound that a point made, or the error in its place; `frames` is None for a picture."""

    index: int
    prompt: str
    seed: int | None
    path: str | None = None  # of the file or the folder of frames, relative to run.json
    error: str | None = None
    frames: int | None = None
    fps: int | None = None
    sample_rate: int | None = None  # of a sound, in Hz
    quality: dict[str, float] | None = None  # by measure, against the uncached reference run


@dataclass(frozen=True)
class Point:
    """A run directory. `status`: complete, failed, unfinished (no run.json) or damaged (one that cannot be read)."""

    name: str  # of the folder, relative to the report's; `.` for the same folder
    folder: Path
    status: str
    error: str | None
    overrides: list[str] | None  # of its command line; None if Hydra's record is missing
    record: dict[str, Any]  # content of run.json; empty if it cannot be read
    outputs: list[Output]

    @property
    def config(self) -> dict[str, Any]:
        """The configuration, empty if unknown."""
        return get_value(self.record, "config", kind=dict) or {}

    def address(self, output: Output) -> str | None:
        """Return the path of an output relative to the report."""
        return output.path if self.name == "." or output.path is None else f"{self.name}/{output.path}"


def collect_points(folder: Path) -> list[Point]:
    """Read the points in and below `folder`, in natural order of their names. Raises UsageError if there are none."""
    if not os.path.isdir(folder):
        raise UsageError(f"report: {folder}: no such folder")
    points = [read_point(folder, place) for place in find_run_folders(folder)]
    if not points:
        raise UsageError(f"report: {folder}: no run in it or below it (a run is a folder with {RECORD_FILE})")
    return sorted(points, key=lambda found: natural_sort_key(found.name))


def find_run_folders(folder: Path) -> Iterator[Path]:
    """Yield every run folder; does not search inside run folders."""
    for place, folders, files in os.walk(folder):
        if RECORD_FILE in files or os.path.isfile(os.path.join(place, OVERRIDES)):
            folders.clear()
            yield Path(place)
        folders[:] = [name for name in folders if not name.startswith(".")]


def natural_sort_key(name: str) -> list[tuple[int, int, str]]:
    """Return a sort key that puts 2 before 10."""
    parts = re.split(r"([0-9]+)", name)
    return [(0, int(part), "") if part.isascii() and part.isdigit() else (1, 0, part) for part in parts]


def read_point(root: Path, folder: Path) -> Point:
    """Read the point in `folder`, also if run.json is missing or damaged."""
    record, error = read_record(folder / RECORD_FILE)
    status = get_value(record, "status", kind=str)
    status = status if status in ("complete", "interrupted") else "failed"
    if not record:
        status = "unfinished" if error == UNFINISHED else "damaged"
    elif status != "complete":
        error = describe_error(record.get("error")) or f"{status}, and run.json does not say why"
    name = folder.relative_to(root).as_posix()
    return Point(name, folder, status, error, read_overrides(folder / OVERRIDES), record, list_outputs(record))


def read_record(file: Path) -> tuple[dict[str, Any], str | None]:
    """Read run.json; returns its content and None, or an empty dict and the error."""
    try:
        record = use_current_names(read_json(file, MAX_BYTES, CONSTANTS))
    except FileNotFoundError:
        return {}, UNFINISHED
    except OSError as error:
        return {}, f"{RECORD_FILE}: {error.strerror}"
    except ValueError as error:
        return {}, f"{RECORD_FILE} is damaged: not a JSON file: {error}"
    if not isinstance(record, dict) or "outputs" not in record:
        return {}, f"{RECORD_FILE} is damaged: not the record of a run"
    if record.get("format") != FORMAT:
        return {}, f"{RECORD_FILE}: its format is {record.get('format')!r}; this version of hydrarun reads {FORMAT}"
    return record, None


def read_overrides(file: Path) -> list[str] | None:
    """Read the command-line overrides as Hydra recorded them; None if there is no valid record."""
    try:
        words = parse_yaml(read_file(file, MAX_OVERRIDES))
    except (OSError, ValueError):
        return None
    return words if isinstance(words, list) and all(isinstance(word, str) for word in words) else None


def list_outputs(record: dict[str, Any]) -> list[Output]:
    """Return the outputs that run.json lists, in order, including those that failed."""
    made = [_read_output(entry) for entry in get_value(record, "outputs", kind=list) or [] if isinstance(entry, dict)]
    missed = [_read_output(entry) for entry in get_value(record, "failed", kind=list) or [] if isinstance(entry, dict)]
    return sorted([*made, *missed], key=lambda output: output.index)


def _read_output(entry: dict[str, Any]) -> Output:
    path = get_value(entry, "path", kind=str)
    error = describe_error(entry.get("error"))
    if path is None:
        error = error or "not made"
    elif Path(path).name != path or path in ("", "..") or "\0" in path:
        path, error = None, f"{path!r} is not the name of a file next to {RECORD_FILE}"
    quality = get_value(entry, "quality", kind=dict) or {}
    numbers = {name: value for name in quality if (value := get_number(quality, name)) is not None}
    return Output(
        get_value(entry, "index", kind=int) or 0,
        get_value(entry, "prompt", kind=str) or "",
        get_value(entry, "seed", kind=int),
        path,
        error,
        get_value(entry, "frames", kind=int),
        get_value(entry, "fps", kind=int),
        get_value(entry, "sample_rate", kind=int),
        numbers or None,
    )


def describe_error(error: Any) -> str | None:
    """Format an error of run.json: its message, preceded by its type if it is an unexpected exception."""
    if isinstance(error, str):
        return error
    kind, message = get_value(error, "type", kind=str), get_value(error, "message", kind=str)
    if message is None:
        return kind
    return message if kind in (None, "RunError", "UsageError", "OutOfMemoryError") else f"{kind}: {message}"


def get_value(content: Any, *keys: str, kind: type | tuple[type, ...]) -> Any:
    """Return the value under nested `keys` if it is of type `kind`, else None. A bool never matches."""
    for key in keys:
        content = content.get(key) if isinstance(content, dict) else None
    return content if isinstance(content, kind) and not isinstance(content, bool) else None


def get_number(content: Any, *keys: str) -> float | None:
    """Return the number under nested `keys`; None if it is missing, infinite, NaN or at least `MOST`."""
    value = get_value(content, *keys, kind=(int, float))
    return value if value is not None and abs(value) < MOST else None
