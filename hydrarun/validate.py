"""Checks of the values in a composed configuration: presence, types, ranges, and how fields fit together.

What depends on the checkpoint (sizes its VAE can make) is checked by the runner, before it loads weights.
"""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from hydrarun.annotations import describe, fits, show
from hydrarun.errors import UsageError, nearest
from hydrarun.schema import Config

MISSING = "???"
DTYPES = ("auto", "float32", "bfloat16", "float16")
MAX_SEED = 2**63 - 1
MAX_PROMPTS = 100_000  # characters of all prompts of a run: with room to spare in a picture's metadata

Problem = tuple[str, str]  # the key, and the sentence about it


def check_values(config: Mapping[str, Any], origin: Callable[[str], str] | None = None) -> None:
    """Raise UsageError with one line for each violation; `origin` tells where a key's value came from."""
    found = list(problems(config))
    if found:
        places = [f" ({origin(key)})" if origin else "" for key, _ in found]
        raise UsageError("\n".join(f"{key}{place}: {text}" for (key, text), place in zip(found, places, strict=True)))


def problems(config: Mapping[str, Any]) -> Iterator[Problem]:
    """Every violation in a plain, resolved configuration."""
    shape = [*_structure(config, Config, ""), *_missing(config, "")]
    yield from shape
    if not shape:
        yield from _device(config["device"])
        yield from _dtype(config["dtype"])
        yield from _sampling(config["sampling"])


def _structure(node: Any, section: type, path: str) -> Iterator[Problem]:
    """Keys and types of the fixed sections; what a composed configuration has anyhow, unless `+` added to it."""
    if not isinstance(node, Mapping):
        yield path or "configuration", "is not a mapping."
        return
    hints = typing.get_type_hints(section)
    for key in node:
        if key not in hints:
            yield f"{path}{key}", f"unknown key.{nearest(str(key), hints)} Known: {', '.join(hints)}."
    for key, hint in hints.items():
        if key not in node:
            yield f"{path}{key}", "is missing."
        elif dataclasses.is_dataclass(hint):
            yield from _structure(node[key], typing.cast(type, hint), f"{path}{key}.")
        elif node[key] != MISSING and not fits(node[key], hint):
            yield f"{path}{key}", f"{show(node[key])} is not {describe(hint)}."


def _missing(node: Any, path: str) -> Iterator[Problem]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _missing(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _missing(value, f"{path}[{index}]")
    elif node == MISSING:
        yield path, "is missing: set it, " + (f'{path}="…"' if path in ("sampling.prompt",) else f"{path}=…")


def _device(device: str) -> Iterator[Problem]:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        yield (
            "device",
            f"{device!r} is none of auto, cpu, cuda, cuda:0, cuda:1….{nearest(device, ('auto', 'cpu', 'cuda'))}",
        )


def _dtype(dtype: str) -> Iterator[Problem]:
    if dtype not in DTYPES:
        yield "dtype", f"{dtype!r} is none of {', '.join(DTYPES)}.{nearest(dtype, DTYPES)}"


def _sampling(sampling: Mapping[str, Any]) -> Iterator[Problem]:
    for key in ("num_inference_steps", "height", "width"):
        yield from _at_least(f"sampling.{key}", sampling[key], 1)
    for key in ("true_cfg_scale", "guidance_scale"):
        value = sampling[key]
        if value is not None and not (math.isfinite(value) and value >= 0):
            yield f"sampling.{key}", f"{value} is not a finite number >= 0."
    if not 1 <= sampling["max_sequence_length"] <= 1024:
        yield "sampling.max_sequence_length", f"{sampling['max_sequence_length']} is not between 1 and 1024."
    yield from _texts(sampling)
    yield from _pictures(sampling)


def _at_least(key: str, value: int, least: int) -> Iterator[Problem]:
    if value < least:
        yield key, f"{value} is below {least}."


def _texts(sampling: Mapping[str, Any]) -> Iterator[Problem]:
    prompt, negative = sampling["prompt"], sampling["negative_prompt"]
    prompts = prompt if isinstance(prompt, list) else [prompt]
    if not prompts or not all(isinstance(text, str) and text for text in prompts):
        yield "sampling.prompt", f"{show(prompt)} is not a non-empty text, or a list of them."
    elif sum(map(len, prompts)) > MAX_PROMPTS:
        yield "sampling.prompt", f"more than {MAX_PROMPTS} characters in all, and each picture carries them."
    if negative is None:
        if sampling["true_cfg_scale"] > 1:
            yield (
                "sampling.negative_prompt",
                f"null, but true_cfg_scale={sampling['true_cfg_scale']} guides away from it:"
                ' set sampling.negative_prompt=" ", or sampling.true_cfg_scale=1 for no guidance.',
            )
        return
    negatives = negative if isinstance(negative, list) else [negative]
    if not all(isinstance(text, str) for text in negatives):
        yield "sampling.negative_prompt", f"{show(negative)} is not null, a text or a list of texts."
    elif isinstance(negative, list) and len(negative) != len(prompts):
        yield (
            "sampling.negative_prompt",
            f"lists {len(negative)} texts for {len(prompts)} prompts: give one for all, or one for each.",
        )


def _pictures(sampling: Mapping[str, Any]) -> Iterator[Problem]:
    seed, count = sampling["seed"], sampling["num_images_per_prompt"]
    if count is not None:
        yield from _at_least("sampling.num_images_per_prompt", count, 1)
    seeds = seed if isinstance(seed, list) else [seed]
    if not seeds or not all(fits(one, int) and 0 <= one <= MAX_SEED for one in seeds):
        yield "sampling.seed", f"{show(seed)} is not a whole number from 0 to 2**63-1, or a list of such numbers."
    elif isinstance(seed, list):
        prompts = len(sampling["prompt"]) if isinstance(sampling["prompt"], list) else 1
        wanted = prompts * (count or 1)
        if prompts and (len(seed) != wanted if count else len(seed) % prompts):
            each = f" x {count} pictures" if count else ""
            yield (
                "sampling.seed",
                f"lists {len(seed)} seeds for {prompts} prompts{each}: give one per picture, or one number for all.",
            )
