"""The uncached twin of a run: the same with `cache=none` and `quantization=none`, kept on disk as an ordinary run that
can be replayed."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hydrarun.config.schema import Report
from hydrarun.core.errors import RunError, UsageError
from hydrarun.core.resources import options
from hydrarun.outputs import reader as recorded
from hydrarun.outputs.media import kinds
from hydrarun.outputs.provenance import asked, config_hash
from hydrarun.outputs.writer import OutputWriter, as_recorded

if TYPE_CHECKING:
    from hydrarun.outputs.writer import Picture


def no_cache() -> dict[str, Any]:
    """The node of `cache=none`."""
    return options("cache")["none"]


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same, but for what may change the pixels to save time or memory: cache and quantization."""
    return {**config, "cache": no_cache(), "quantization": options("quantization")["none"]}


def configuration(config: Mapping[str, Any]) -> dict[str, Any]:
    """The twin's: plain, measured by nothing, drawn once, and written without loss."""
    output = {**config["output"], "format": [*kinds.drawn_by(config["model"]).formats][-1], "metadata": True}
    return {**plain(config), "report": asdict(Report()), "output": output, "warmup": 0}


def folder(config: Mapping[str, Any]) -> Path:
    """Where the twin of `config` is kept, absolute."""
    return Path(config["report"]["twins"]).expanduser().resolve() / config_hash(as_recorded(configuration(config)))


def kept(config: Mapping[str, Any], facts: Mapping[str, Any]) -> list[np.ndarray] | None:
    """The kept twin of `config`: the array (`hydrarun.outputs.media.kinds`) of each output, in order.

    None where there is none, or not the one that would be drawn now: not complete, another configuration, pixels other
    than recorded, or made with others of the `facts` (`OutputWriter.facts`) about weights, versions, hardware, inputs….
    """
    file = folder(config) / "run.json"
    wanted = ("complete", asked(as_recorded(configuration(config))), {key: facts.get(key) for key in recorded.FACTS})
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        if (record["status"], asked(record["config"]), {key: record.get(key) for key in recorded.FACTS}) != wanted:
            return None
        pictures = recorded.load(file).pictures
    except (OSError, ValueError, LookupError, TypeError, UsageError):  # not as `keep` left it
        return None
    pixels = [picture.pixels for picture in pictures if picture.pixels is not None]
    return pixels if len(pixels) == len(pictures) else None


def keep(
    config: Mapping[str, Any], facts: dict[str, Any], pictures: Sequence[Picture], results: dict[str, Any]
) -> None:
    """Write the twin of `config` in the place of an older one. `results`: as `OutputWriter.finish` takes them.

    Raises RunError for pixels that cannot be a picture, and for a folder that cannot be written.
    """
    place = folder(config)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{place.name}.", suffix=".tmp", dir=place.parent) as temporary:
            new = Path(temporary, "new")
            writer = OutputWriter(new, configuration(config), facts, metadata=True)
            for picture in pictures:
                writer.save(**vars(picture), timings=results["timings"])
            writer.finish(results)
            _put(new, place, Path(temporary, "old"))
    except RunError as error:
        raise RunError(f"the uncached twin: {error}") from None
    except OSError as error:
        raise RunError(
            f"the uncached twin cannot be kept in {place}: {error.strerror}; choose another folder: report.twins=…"
        ) from None


def _put(new: Path, place: Path, old: Path) -> None:
    """Move `new` to `place`, and what was there to `old`."""
    with suppress(FileNotFoundError):
        os.replace(place, old)
    try:
        os.replace(new, place)
    except OSError:
        if not (place / "run.json").exists():  # if it does, another run has just kept the same twin
            raise
