"""Checks what makes up the items of a run: prompts, negative prompts, seeds, and how many there are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from hydrarun.config import batches
from hydrarun.config.bounds import MAX_BATCH, MAX_PICTURES, MAX_SEED
from hydrarun.config.type_check import format_value, matches_hint

MAX_PROMPTS = 100_000  # characters of all prompts of a run, which fit into a picture's metadata

Problem = tuple[str, str]  # key, sentence


def find_problems(sampling: Mapping[str, Any], captioned: bool) -> Iterator[Problem]:
    """Yield every violation in the texts and seeds of a request. `captioned`: prompts may be empty or null."""
    yield from _check_texts(sampling, captioned)
    yield from _check_seeds(sampling)


def find_total_problem(config: Mapping[str, Any]) -> Iterator[Problem]:
    """Check the number of pictures of a run before anything lists them."""
    total = batches.count_items(config)
    listed = "seed" if isinstance(config["sampling"]["seed"], list) else "num_images_per_prompt"
    key = f"sampling.{listed}" if config["input"]["prompts"] is None else "input.prompts"
    if total > MAX_PICTURES:
        yield key, f"asks for {total} pictures in one run; {MAX_PICTURES} at most."
    elif total > MAX_BATCH and not batches.is_batch_run(config):
        yield key, f"asks for {total} pictures in one batch; {MAX_BATCH} at most: set batch_size."


def _check_texts(sampling: Mapping[str, Any], captioned: bool) -> Iterator[Problem]:
    prompt, negative = sampling["prompt"], sampling["negative_prompt"]
    prompts = prompt if isinstance(prompt, list) else ["" if captioned and prompt is None else prompt]
    if not prompts or not all(isinstance(text, str) and (text or captioned) for text in prompts):
        yield "sampling.prompt", f"{format_value(prompt)} is not a non-empty text, or a list of them."
    elif sum(map(len, prompts)) > MAX_PROMPTS:
        yield "sampling.prompt", f"more than {MAX_PROMPTS} characters in all, and each picture's metadata holds them."
    if negative is None:
        return
    negatives = negative if isinstance(negative, list) else [negative]
    if not all(isinstance(text, str) for text in negatives):
        yield "sampling.negative_prompt", f"{format_value(negative)} is not null, a text or a list of texts."
    elif isinstance(negative, list) and len(negative) != len(prompts):
        yield (
            "sampling.negative_prompt",
            f"lists {len(negative)} texts for {len(prompts)} prompts: give one for all, or one for each.",
        )


def _check_seeds(sampling: Mapping[str, Any]) -> Iterator[Problem]:
    seed, count = sampling["seed"], sampling["num_images_per_prompt"]
    seeds = seed if isinstance(seed, list) else [seed]
    if not seeds or not all(matches_hint(one, int) and 0 <= one <= MAX_SEED for one in seeds):
        yield (
            "sampling.seed",
            f"{format_value(seed)} is not a whole number from 0 to 2**63-1, or a list of such numbers.",
        )
    elif isinstance(seed, list):
        prompts = len(sampling["prompt"]) if isinstance(sampling["prompt"], list) else 1
        wanted = prompts * (count or 1)
        if prompts and (len(seed) != wanted if count else len(seed) % prompts):
            each = f" x {count} pictures" if count else ""
            yield (
                "sampling.seed",
                f"lists {len(seed)} seeds for {prompts} prompts{each}: give one per picture, or one number for all.",
            )
    elif seed > (most := MAX_SEED - max(count or 1, 1) + 1):
        yield "sampling.seed", f"{seed} is above {most}: the last of {count} pictures gets seed + {(count or 1) - 1}."
