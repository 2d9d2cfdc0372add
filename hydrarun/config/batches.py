"""Many pictures: what each of them is, and which of them are drawn together.

A run is one of batches if it has `input.prompts` or `batch_size`. Everything here is plain data: the driver and every
rank come to the same items and batches from the same configuration.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydrarun.config import prompts
from hydrarun.config.prompts import LINE, Line

Config = dict[str, Any]


@dataclass(frozen=True)
class Item:
    """One picture or video of the run: its place in it, and the `sampling` and input images that draw it alone."""

    index: int
    sampling: dict[str, Any]
    images: Any
    line: int | None = None


def batched(config: Mapping[str, Any]) -> bool:
    """Whether the run is one of batches."""
    return config["input"]["prompts"] is not None or config["batch_size"] is not None


def resolved(config: Config) -> Config:
    """The same with the lines of the file `input.prompts` in its place. Raises UsageError."""
    given = config["input"]["prompts"]
    if not isinstance(given, str):
        return config
    return {**config, "input": {**config["input"], "prompts": prompts.read(given)}}


def limit(config: Mapping[str, Any]) -> int:
    """The most pictures of one batch; by itself the lines of a file are drawn one by one, or one by each rank."""
    return config["batch_size"] or config["parallel"]["data_degree"]


def each(config: Config) -> Iterator[tuple[Line | None, Config]]:
    """Each line with the configuration of a run that draws it; of a run without a file that run itself."""
    lines = config["input"]["prompts"]
    if lines is None:
        yield None, config
    else:
        yield from ((line, single(config, line)) for line in lines)


def single(config: Config, line: Line) -> Config:
    """The configuration of a run that draws what one line says."""
    own = {name: value for name, value in line.items() if name not in (LINE, "images")}
    given = {"images": line.get("images", config["input"]["images"]), "prompts": None}
    return {**config, "sampling": {**config["sampling"], **own}, "input": given, "batch_size": limit(config)}


def items(config: Config) -> list[Item]:
    """Every picture of the run, line after line, and of a line one after the other."""
    found: list[Item] = []
    for line, one in each(config):
        for prompt, negative, seed in expand(one["sampling"]):
            alone = {"prompt": prompt, "negative_prompt": negative, "seed": seed, "num_images_per_prompt": 1}
            place = line.get(LINE) if line else None
            found.append(Item(len(found), {**one["sampling"], **alone}, one["input"]["images"], place))
    return found


def expand(sampling: Mapping[str, Any]) -> list[tuple[str, str | None, int]]:
    """Prompt, negative prompt and seed of each picture: prompt after prompt, and of each its pictures.

    A whole number as seed: the k-th picture of every prompt gets `seed + k`. A list: one per picture. No
    prompt (null) is an empty one.
    """
    texts, seeds = as_list(sampling["prompt"] or ""), sampling["seed"]
    negatives = sampling["negative_prompt"]
    negatives = negatives if isinstance(negatives, list) else [negatives] * len(texts)
    if isinstance(seeds, list):
        count = len(seeds) // len(texts)
    else:
        count = sampling["num_images_per_prompt"] or 1
        seeds = [seeds + k for _ in texts for k in range(count)]
    pairs = [pair for pair in zip(texts, negatives, strict=True) for _ in range(count)]
    return [(*pair, seed) for pair, seed in zip(pairs, seeds, strict=True)]


def as_list(value: str | list[str]) -> list[str]:
    """A single text is a list of one."""
    return value if isinstance(value, list) else [value]


def together(found: Sequence[Item], most: int) -> list[tuple[Item, ...]]:
    """Batches of at most `most` items that go together, by their first items' places.

    Items do if they differ in prompt, negative prompt and seed alone, and have a negative prompt all or none.
    """
    alike: dict[str, list[Item]] = {}
    for item in found:
        alike.setdefault(_kind(item), []).append(item)
    batches = [tuple(group[start : start + most]) for group in alike.values() for start in range(0, len(group), most)]
    return sorted(batches, key=lambda batch: batch[0].index)


def _kind(item: Item) -> str:
    guided = item.sampling["negative_prompt"] is not None
    common = {**item.sampling, "prompt": None, "negative_prompt": guided, "seed": None}
    return json.dumps([common, item.images], sort_keys=True)


def configuration(config: Config, batch: Sequence[Item]) -> Config:
    """The configuration of a run that draws this batch and nothing else."""
    first = batch[0].sampling
    texts = {name: [item.sampling[name] for item in batch] for name in ("prompt", "negative_prompt", "seed")}
    if first["negative_prompt"] is None:
        texts["negative_prompt"] = None  # type: ignore[assignment]
    many = {**texts, "num_images_per_prompt": None} if len(batch) > 1 else {}
    given = {"images": batch[0].images, "prompts": None}
    plain = {"batch_size": None, "retry": 0, "fail_fast": False}
    return {**config, **plain, "sampling": {**first, **many}, "input": given}
