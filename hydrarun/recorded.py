"""What a finished file says about the run that made it. The file may be a stranger's: nothing in it is believed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from hydrarun.errors import UsageError
from hydrarun.media import png
from hydrarun.outputs import FORMAT, WHICH, pixels_sha256

T = TypeVar("T")

MAX_JSON_BYTES = 64 * 2**20

# what the run really used, beside its configuration
FACTS = ("versions", "hardware", "weights", "device", "dtype", "attention", "scheduler", "compile")


@dataclass
class Picture:
    """One picture of the run: its place in it, the hash of its pixels, and the pixels where they are at hand.

    `pixels` is None when the file is gone, or no longer holds the pixels that the hash was made of.
    """

    name: str
    index: int
    pixels_sha256: str
    pixels: np.ndarray | None


@dataclass
class Recorded:
    """The configuration of the whole run (plain, redacted, not yet validated), what it used, and its pictures."""

    config: dict[str, Any]
    facts: dict[str, Any]
    pictures: list[Picture]


def load(path: Path) -> Recorded:
    """Read a PNG file with metadata, or a run.json. Raises UsageError of one line for anything else."""
    return _from_run(path) if path.suffix.lower() == ".json" else _from_png(path)


def _from_png(path: Path) -> Recorded:
    pixels, record = png.read(path)
    if record is None:
        raise UsageError(
            f"{path}: holds no recipe: it was written with output.metadata=false, by another tool, or the text chunks "
            "were stripped on the way; a run.json beside it can be replayed instead"
        )
    _check_format(path, record)
    config = _get(path, record, "config", dict)
    sampling = _get(path, config, "sampling", dict)
    batch = _get(path, record, "batch", dict)
    index = _get(path, batch, "index", int)
    which = _get(path, batch, "sampling", dict)
    if set(which) != set(WHICH):
        raise UsageError(f"{path}: batch.sampling must hold {', '.join(WHICH)}")
    run_config = {**config, "sampling": {**sampling, **which}}
    return Recorded(run_config, _facts(record), [_picture(path, index, record, pixels)])


def _from_run(path: Path) -> Recorded:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise UsageError(f"{path}: refused, larger than {MAX_JSON_BYTES} bytes")
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise UsageError(f"{path}: not a JSON file") from None
    if not isinstance(record, dict):
        raise UsageError(f"{path}: not the run.json of a run")
    _check_format(path, record)
    pictures = [
        _picture(path, _get(path, output, "index", int), output, _pixels_beside(path, output))
        for output in _get(path, record, "outputs", list)
    ]
    if not pictures:
        raise UsageError(f"{path}: lists no pictures to compare with")
    return Recorded(_get(path, record, "config", dict), _facts(record), pictures)


def _pixels_beside(path: Path, output: Any) -> np.ndarray | None:
    """The pixels of a listed file, which must lie beside run.json; None when it is not there."""
    name = _get(path, output, "path", str)
    if Path(name).name != name or name in ("", ".."):
        raise UsageError(f"{path}: {name!r} is not the name of a file beside it")
    file = path.with_name(name)
    return png.read(file)[0] if file.is_file() else None


def _picture(path: Path, index: int, record: dict[str, Any], pixels: np.ndarray | None) -> Picture:
    digest = _get(path, record, "pixels_sha256", str)
    unchanged = pixels is not None and pixels_sha256(pixels) == digest
    return Picture(record.get("path", path.name), index, digest, pixels if unchanged else None)


def _check_format(path: Path, record: dict[str, Any]) -> None:
    if record.get("format") != FORMAT:
        raise UsageError(f"{path}: its format is {record.get('format')!r}; this version of hydrarun reads {FORMAT}")


def _facts(record: dict[str, Any]) -> dict[str, Any]:
    return {key: record.get(key) for key in FACTS}


def _get(path: Path, record: Any, key: str, kind: type[T]) -> T:
    value = record.get(key) if isinstance(record, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise UsageError(f"{path}: {key!r} is missing or not a {kind.__name__}")
    return value
