"""The recipe inside an output file: JSON text of bounded size."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import PngImagePlugin

from hydrarun.core.errors import UsageError
from hydrarun.core.strict_json import CONSTANTS, parse_json

#: Pillow refuses compressed PNG chunks that decompress to more; all other texts get the same limit
MAX_TEXT_BYTES = PngImagePlugin.MAX_TEXT_CHUNK


def check_text_sizes(texts: Mapping[str, str], holder: str) -> None:
    """Raise ValueError for a text that `parse_recipe` would refuse. `texts`: by keyword; `holder`: the container."""
    for keyword, value in texts.items():
        if len(value.encode()) > MAX_TEXT_BYTES:
            raise ValueError(f"the {keyword!r} {holder} is larger than {MAX_TEXT_BYTES} bytes")


def parse_recipe(path: Path, text: str | None, holder: str) -> dict[str, Any] | None:
    """Parse the recipe in the text of a file; None if there is no text.

    `holder` names the container in messages. Raises UsageError, naming `path`, for a text that is not a recipe.
    """
    if text is None:
        return None
    if len(text.encode(errors="replace")) > MAX_TEXT_BYTES:
        raise UsageError(f"{path}: refused, its {holder} is larger than {MAX_TEXT_BYTES} bytes")
    try:
        recipe = parse_json(text, CONSTANTS)
    except ValueError as error:
        raise UsageError(f"{path}: its {holder} is not a JSON object: {error}") from None
    if not isinstance(recipe, dict):
        raise UsageError(f"{path}: its {holder} is not a JSON object")
    return recipe
