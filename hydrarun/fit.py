"""Does a request fit a checkpoint? Reads JSON only, so that what cannot be is refused before anything heavy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hydrarun.errors import UsageError

#: latent pixels per token, along one side
PATCH = 2


def check_fit(sampling: dict[str, Any], folder: Path) -> None:
    """Refuse what the checkpoint in `folder` cannot make or would ignore; says nothing where its JSON does not tell."""
    multiple = size_multiple(folder)
    if multiple is not None:
        check_size(sampling["height"], sampling["width"], multiple)
    distilled = read(folder / "transformer" / "config.json").get("guidance_embeds")
    if distilled is not None:
        check_guidance_scale(sampling["guidance_scale"], distilled)


def size_multiple(folder: Path) -> int | None:
    """Pixels that height and width must be a multiple of, or None when vae/config.json does not tell."""
    levels = read(folder / "vae" / "config.json").get("temperal_downsample")
    return 2 ** len(levels) * PATCH if isinstance(levels, list) else None


def check_size(height: int, width: int, multiple: int) -> None:
    """Raises `UsageError` naming the nearest sizes that would do."""
    for key, value in (("height", height), ("width", width)):
        if value % multiple:
            below, above = value // multiple * multiple, (value // multiple + 1) * multiple
            choice = f"sampling.{key}={below} or sampling.{key}={above}" if below else f"sampling.{key}={above}"
            raise UsageError(f"sampling.{key}={value}: this checkpoint needs a multiple of {multiple}: {choice}")


def check_guidance_scale(scale: float | None, distilled: bool) -> None:
    """Raises `UsageError` for a scale that the checkpoint, which is not guidance-distilled, would ignore."""
    if scale is not None and not distilled:
        raise UsageError(
            f"sampling.guidance_scale={scale}: this checkpoint is not guidance-distilled and would ignore it;"
            " use sampling.true_cfg_scale"
        )


def read(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one where there is none to read: loading says what is wrong with it."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
