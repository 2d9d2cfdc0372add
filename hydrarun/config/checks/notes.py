"""Notes about requests that are drawn as asked, but perhaps not as expected. A sweep may include such values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from hydrarun.config import batches
from hydrarun.config.checks.values import find_cfg_scale, get_unguided_scale

#: generators on the CPU, which draw the noise, use the last 32 bits of a seed
SEEDS = 2**32

MAX_LINES = 5  # numbers of lines in a note


def find_notes(config: dict[str, Any], negative: bool, setter: str = "") -> Iterator[str]:
    """Yield the notes about a checked configuration, each once.

    `negative`: whether the user gave `sampling.negative_prompt`, for all lines of `input.prompts`; `setter`: where.
    """
    found: dict[str, list[int]] = {}
    for line, one in batches.iterate_lines(config):
        own = line is not None and "negative_prompt" in line
        for text in _find_request_notes(one, negative or own, "" if own else setter):
            found.setdefault(text, []).append(line[batches.LINE] if line else 0)
    for text, numbers in found.items():
        yield f"{_format_lines(numbers)}{text}"


def _find_request_notes(config: Mapping[str, Any], negative: bool, setter: str) -> Iterator[str]:
    sampling, (name, scale) = config["sampling"], find_cfg_scale(config)
    unguided = scale is not None and scale <= get_unguided_scale(config)
    if negative and unguided and sampling["negative_prompt"] is not None:
        origin = f" ({setter})" if setter else ""
        yield f"sampling.negative_prompt{origin} is not used: sampling.{name}={scale} turns guidance off"
    seeds = [seed for _, _, seed in batches.expand_prompts(sampling)]
    if large := next((seed for seed in seeds if seed >= SEEDS), None):
        yield f"sampling.seed: {large} draws the same noise as {large % SEEDS}: 32 bits of a seed are used"


def _format_lines(numbers: list[int]) -> str:
    if not any(numbers):
        return ""
    shown = ", ".join(map(str, numbers[:MAX_LINES])) + (", …" if len(numbers) > MAX_LINES else "")
    return f"input.prompts, line{'' if len(numbers) == 1 else 's'} {shown}: "
