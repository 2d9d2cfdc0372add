"""What files that libav reads have in common: a stranger's may be anything, and a comment carries the recipe."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import av

from hydrarun.core.errors import UsageError
from hydrarun.outputs.media import png

T = TypeVar("T")

MAX_TEXT_BYTES = png.MAX_TEXT_BYTES


def read(path: Path, kind: str, decode: Callable[[Path, BinaryIO], T]) -> T:
    """What `decode` makes of the open file, called `kind` in sentences.

    Everything that can be wrong with it is a `UsageError` of one line.
    """
    try:
        with open(path, "rb") as file:
            return decode(path, file)
    except av.FFmpegError as error:  # before OSError, which some of them also are
        raise UsageError(f"{path}: damaged {kind} file: {error.strerror}") from None
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None


def recipe(path: Path, text: str | None) -> dict[str, Any] | None:
    """What a comment says; None where there is none. Raises UsageError for one that is no recipe."""
    if text is None:
        return None
    if len(text.encode(errors="replace")) > MAX_TEXT_BYTES:
        raise UsageError(f"{path}: refused, its comment tag is larger than {MAX_TEXT_BYTES} bytes")
    try:
        metadata = json.loads(text)
    except (ValueError, RecursionError):
        metadata = None
    if not isinstance(metadata, dict):
        raise UsageError(f"{path}: its comment tag is not a JSON object")
    return metadata
