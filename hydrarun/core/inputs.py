"""The input files that a configuration names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def image_paths(config: Mapping[str, Any]) -> list[str]:
    """Return `input.images` as a list."""
    images = config["input"]["images"]
    return [images] if isinstance(images, str) else list(images or [])
