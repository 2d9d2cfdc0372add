"""Reads the sections of a recipe's file: plain YAML of bounded size."""

from __future__ import annotations

from typing import Any

from hydrarun.core.strict_yaml import parse_yaml

MAX_BYTES = 64 * 1024


class RecipeError(Exception):
    """The reason why a recipe is refused, as one sentence. The caller adds the recipe's name."""


def parse_sections(data: bytes) -> tuple[str, dict[str, Any]]:
    """Return the text of a recipe's file and its top-level sections. Raises RecipeError."""
    if len(data) > MAX_BYTES:
        raise RecipeError(f"larger than {MAX_BYTES // 1024} KiB, the limit for recipes.")
    try:
        content = parse_yaml(data)
    except ValueError as error:
        raise RecipeError(f"{error}.") from None
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise RecipeError("not a mapping of sections, such as `sampling: {num_inference_steps: 8}`.")
    return data.decode(), content
