"""What a model draws, and what follows from it: words, formats, and how many parts an output has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Kind(NamedTuple):
    """What a model draws. A model whose `takes` lists the field `counted` draws that kind."""

    one: str  # in sentences
    many: str
    nameless: str  # in the name of a file whose prompt has no letters for it
    formats: Mapping[str, str]  # {value of output.format: the file's suffix, "" for a folder}; the last is without loss
    counted: str | None  # the field of `sampling` with the number of its parts; None: it has none
    parts: str  # what these are called
    alpha: bool = False  # whether pixels are RGBA, those of input images too


VIDEO = Kind("video", "videos", "video", {"mp4": ".mp4", "frames": ""}, "num_frames", "frames")
LAYERS = Kind("layered picture", "layered pictures", "layers", {"layers": ""}, "layers", "layers", alpha=True)
PICTURE = Kind("picture", "pictures", "picture", {"png": ".png"}, None, "")
KINDS = (VIDEO, LAYERS, PICTURE)


def drawn_by(model: Mapping[str, Any]) -> Kind:
    """What the model of the section `model` draws."""
    return next(kind for kind in KINDS if kind.counted is None or kind.counted in model["takes"])


def written_as(output_format: str) -> Kind:
    """The kind that a format is of."""
    return next(kind for kind in KINDS if output_format in kind.formats)


def length(config: Mapping[str, Any]) -> str | None:
    """How many parts each output of a run has, `81 frames`; None where it has none."""
    kind = drawn_by(config["model"])
    return f"{config['sampling'][kind.counted]} {kind.parts}" if kind.counted else None
