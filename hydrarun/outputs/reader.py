"""Reads the metadata that an output file carries about its run. The file is untrusted: every field is validated."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from hydrarun.core.errors import UsageError
from hydrarun.core.moved_names import use_current_names
from hydrarun.core.strict_json import CONSTANTS, read_json
from hydrarun.outputs.media import frames
from hydrarun.outputs.media.read import read_output
from hydrarun.outputs.writer import FORMAT, WHICH, hash_pixels

T = TypeVar("T")

MAX_JSON_BYTES = 64 * 2**20

# what the run really used, in addition to its configuration
FACTS = (
    "versions",
    "hardware",
    "weights",
    "inputs",
    "device",
    "dtype",
    "attention",
    "scheduler",
    "compile",
    "quantization",
    "sample_rate",
)


@dataclass
class RecordedPicture:
    """One output of the run: its index, the hash of its pixels, and the pixels if available.

    `pixels` (an array of `hydrarun.outputs.media.kinds`) is None if the file is missing or its pixels do not match the
    hash; pixels of a `lossy` file are kept unchecked, since they never match. `part`: the name of the file if it is a
    single file of a folder of frames or layers; hash and pixels are then of that file.
    """

    name: str
    index: int
    pixels_sha256: str
    pixels: np.ndarray | None
    lossy: bool = False
    part: str | None = None


@dataclass
class RecordedRun:
    """The configuration of the whole run (plain, redacted, not yet validated), `FACTS` about it, and its pictures."""

    config: dict[str, Any]
    facts: dict[str, Any]
    pictures: list[RecordedPicture]


def load_recorded_run(path: Path) -> RecordedRun:
    """Load a file or folder with metadata (`hydrarun.outputs.media.read`), one file of such a folder, or a run.json.

    Raises a one-line UsageError for anything else.
    """
    return _load_run_json(path) if path.suffix.lower() == ".json" else _load_media_file(path)


def _read_config(path: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Return the recorded configuration with current class names."""
    return use_current_names(_get_field(path, record, "config", dict))


def is_lossy(path: Path) -> bool:
    """Return whether the file format is lossy."""
    return path.suffix.lower() == ".mp4"


def _load_media_file(path: Path) -> RecordedRun:
    pixels, record = read_output(path)
    if record is None:
        raise UsageError(
            f"{path}: holds no recipe: it was written with output.metadata=false, by another tool, or the recipe was "
            "stripped since; if there is a run.json next to it, replay that instead"
        )
    _check_format(path, record)
    config = _read_config(path, record)
    sampling = _get_field(path, config, "sampling", dict)
    batch = _get_field(path, record, "batch", dict)
    index = _get_field(path, batch, "index", int)
    which = _get_field(path, batch, "sampling", dict)
    if set(which) != set(WHICH):
        raise UsageError(f"{path}: batch.sampling must hold {', '.join(WHICH)}")
    run_config = {**config, "sampling": {**sampling, **which}}
    whole, part = "pixels_sha256", None
    for form, (stem, _) in frames.STEMS.items():
        if stem in record and not os.path.isdir(path):
            whole, part = f"{stem}_sha256", frames.frame_file_name(_get_field(path, record, stem, int), form)
    digest = _get_field(path, record, whole, str)
    picture = RecordedPicture(
        path.name, index, digest, _match_hashed_pixels(path, pixels, digest), is_lossy(path), part
    )
    return RecordedRun(run_config, _read_facts(record), [picture])


def read_run_json(path: Path) -> dict[str, Any]:
    """Read a run.json of this format, with current class names. Raises UsageError for any other file."""
    try:
        record = use_current_names(read_json(path, MAX_JSON_BYTES, CONSTANTS))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"{path}: not a JSON file: {error}") from None
    if not isinstance(record, dict):
        raise UsageError(f"{path}: not the run.json of a run")
    _check_format(path, record)
    return record


def _load_run_json(path: Path) -> RecordedRun:
    record = read_run_json(path)
    pictures = [_load_listed_output(path, output) for output in _get_field(path, record, "outputs", list)]
    if not pictures:
        raise UsageError(f"{path}: lists no pictures to compare with")
    return RecordedRun(_get_field(path, record, "config", dict), _read_facts(record), pictures)


def _load_listed_output(path: Path, output: Any) -> RecordedPicture:
    """Load one output that run.json lists. Its file may be missing, but must not be outside the folder of run.json."""
    name = _get_field(path, output, "path", str)
    if Path(name).name != name or name in ("", ".."):
        raise UsageError(f"{path}: {name!r} is not the name of a file next to it")
    index, digest = _get_field(path, output, "index", int), _get_field(path, output, "pixels_sha256", str)
    file = path.with_name(name)
    pixels = _match_hashed_pixels(file, read_output(file)[0], digest) if os.path.exists(file) else None
    return RecordedPicture(name, index, digest, pixels, is_lossy(file))


def _match_hashed_pixels(path: Path, pixels: np.ndarray, digest: str) -> np.ndarray | None:
    """Return the pixels if they match the hash or the file is lossy, otherwise None."""
    return pixels if is_lossy(path) or hash_pixels(pixels) == digest else None


def _check_format(path: Path, record: dict[str, Any]) -> None:
    if record.get("format") != FORMAT:
        raise UsageError(f"{path}: its format is {record.get('format')!r}; this version of hydrarun reads {FORMAT}")


def _read_facts(record: dict[str, Any]) -> dict[str, Any]:
    return {key: record.get(key) for key in FACTS}


def _get_field(path: Path, record: Any, key: str, kind: type[T]) -> T:
    value = record.get(key) if isinstance(record, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise UsageError(f"{path}: {key!r} is missing or not a {kind.__name__}")
    return value
