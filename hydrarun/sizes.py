"""Which heights and widths a checkpoint takes. Reads JSON only, so that a wrong size is refused at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hydrarun.errors import UsageError

#: latent pixels per token, along one side
PATCH = 2


def size_multiple(folder: Path) -> int | None:
    """Pixels that height and width must be a multiple of, or None when vae/config.json does not tell."""
    try:
        config = json.loads((folder / "vae" / "config.json").read_text())
        return 2 ** len(config["temperal_downsample"]) * PATCH
    except (OSError, ValueError, KeyError, TypeError):
        return None


def check_sampling(sampling: dict[str, Any], folder: Path) -> None:
    """Refuse a size that the checkpoint in `folder` cannot make; says nothing where its JSON does not tell."""
    multiple = size_multiple(folder)
    if multiple is not None:
        check_size(sampling["height"], sampling["width"], multiple)


def check_size(height: int, width: int, multiple: int) -> None:
    """Raises `UsageError` naming the nearest sizes that would do."""
    for key, value in (("height", height), ("width", width)):
        if value % multiple:
            below, above = value // multiple * multiple, (value // multiple + 1) * multiple
            choice = f"sampling.{key}={below} or sampling.{key}={above}" if below else f"sampling.{key}={above}"
            raise UsageError(f"sampling.{key}={value}: this checkpoint needs a multiple of {multiple}: {choice}")
