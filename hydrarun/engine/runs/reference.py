"""The reference run of a run: the same with `cache=none` and `quantization=none`, kept on disk as an ordinary run
that can be replayed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hydrarun.config.schema import Report
from hydrarun.core.errors import RunError, UsageError, WriteError
from hydrarun.core.files import resolve_path
from hydrarun.core.resources import read_options
from hydrarun.core.strict_json import CONSTANTS, read_json
from hydrarun.outputs import reader
from hydrarun.outputs.media import kinds
from hydrarun.outputs.provenance import hash_config, keep_pixel_settings
from hydrarun.outputs.writer import OutputWriter, to_recorded_config

if TYPE_CHECKING:
    from hydrarun.outputs.writer import Picture


def make_no_cache_node() -> dict[str, Any]:
    """Return the node of `cache=none`."""
    return read_options("cache")["none"]


def strip_accelerations(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return `config` without accelerations that may change the pixels: cache and quantization."""
    return {**config, "cache": make_no_cache_node(), "quantization": read_options("quantization")["none"]}


def make_reference_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the reference run's config: no accelerations, no metrics, no warm-up, and a lossless output format."""
    output = {**config["output"], "format": [*kinds.find_model_kind(config["model"]).formats][-1], "metadata": True}
    return {**strip_accelerations(config), "report": asdict(Report()), "output": output, "warmup": 0}


def find_reference_dir(config: Mapping[str, Any]) -> Path:
    """Return the absolute folder of the reference run of `config`."""
    return resolve_path(config["report"]["twins"]) / hash_config(to_recorded_config(make_reference_config(config)))


def read_reference(config: Mapping[str, Any], facts: Mapping[str, Any]) -> list[np.ndarray] | None:
    """Read the reference run of `config`: the array (`hydrarun.outputs.media.kinds`) of each output, in order.

    Returns None if there is none, or if it differs from the run that would be drawn now: incomplete, another
    configuration, pixels other than recorded, or other `facts` (`OutputWriter.facts`) about weights, versions,
    hardware, inputs….
    """
    file = find_reference_dir(config) / "run.json"
    wanted = (
        "complete",
        keep_pixel_settings(to_recorded_config(make_reference_config(config))),
        {key: facts.get(key) for key in reader.FACTS},
    )
    try:
        record = read_json(file, reader.MAX_JSON_BYTES, CONSTANTS)
        if (
            record["status"],
            keep_pixel_settings(record["config"]),
            {key: record.get(key) for key in reader.FACTS},
        ) != wanted:
            return None
        pictures = reader.load_recorded_run(file).pictures
    except (OSError, ValueError, LookupError, TypeError, UsageError):  # not as `save_reference` wrote it
        return None
    pixels = [picture.pixels for picture in pictures if picture.pixels is not None]
    return pixels if len(pixels) == len(pictures) else None


def save_reference(
    config: Mapping[str, Any], facts: dict[str, Any], pictures: Sequence[Picture], results: dict[str, Any]
) -> None:
    """Write the reference run of `config`, replacing an older one. `results`: as for `OutputWriter.finish`.

    Raises RunError for pixels that are not a valid picture, and for a folder that cannot be written.
    """
    place = find_reference_dir(config)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{place.name}.", suffix=".tmp", dir=place.parent) as temporary:
            new = Path(temporary, "new")
            writer = OutputWriter(new, make_reference_config(config), facts, metadata=True)
            for picture in pictures:
                writer.save(**vars(picture), timings=results["timings"])
            writer.finish(results)
            _replace_folder(new, place, Path(temporary, "old"))
    except WriteError as error:
        raise RunError(f"the reference run cannot be kept: {error}; choose another folder: report.twins=…") from None
    except RunError as error:
        raise RunError(*f"the reference run: {error}".split("\n")) from None
    except OSError as error:
        raise RunError(
            f"the reference run cannot be kept in {place}: {error.strerror}; choose another folder: report.twins=…"
        ) from None


def _replace_folder(new: Path, place: Path, old: Path) -> None:
    """Move `new` to `place`, and a folder that is already there to `old`."""
    with suppress(FileNotFoundError):
        os.replace(place, old)
    try:
        os.replace(new, place)
    except OSError:
        if not (place / "run.json").exists():  # else another run has just kept the same reference run
            raise
