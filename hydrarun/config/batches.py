"""Batch runs: lists the pictures of a run and groups them into batches.

A run is a batch run if it has `input.prompts` or `batch_size`. The driver computes items and batches once. It sends the
ranks a `BatchJob` with the batches to draw.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from hydrarun.config import prompts
from hydrarun.config.prompts import LINE, Line

Config = dict[str, Any]


@dataclass(frozen=True)
class BatchItem:
    """One picture or video of the run: its index, and the `sampling` and input images that draw it alone."""

    index: int
    sampling: dict[str, Any]
    images: Any
    line: int | None = None

    def to_json(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the item as JSON for `from_json`. Leaves out values equal to the run's `config`, to keep it small."""
        sampling, images = config["sampling"], config["input"]["images"]
        own = {
            name: value
            for name, value in self.sampling.items()
            if name not in sampling or _json_differs(value, sampling[name])
        }
        return {
            "index": self.index,
            "sampling": own,
            **({"images": self.images} if _json_differs(self.images, images) else {}),
            **({"line": self.line} if self.line is not None else {}),
        }

    @classmethod
    def from_json(cls, row: Mapping[str, Any], config: Mapping[str, Any]) -> BatchItem:
        """Return the item that `to_json` wrote with the same `config`."""
        images = row.get("images", config["input"]["images"])
        return cls(row["index"], {**config["sampling"], **row["sampling"]}, images, row.get("line"))


def _json_differs(one: Any, other: Any) -> bool:
    """Return whether two values differ as JSON. In Python 1 equals 1.0, but their output files have different names."""
    return json.dumps(one) != json.dumps(other)


class PendingBatch(NamedTuple):
    """A batch to draw: its number in the run, its items, and the indices of those that are not drawn yet."""

    number: int
    items: tuple[BatchItem, ...]
    missing: tuple[int, ...]


class BatchJob(NamedTuple):
    """The job that the driver sends to the ranks: the batches to draw, in order, and the run's number of batches."""

    output_dir: Path
    batches: list[PendingBatch]
    total: int

    def to_json(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the job as JSON for `from_json`. `config` is the run's configuration, which the ranks have too."""
        rows = [
            {
                "number": batch.number,
                "items": [item.to_json(config) for item in batch.items],
                "missing": list(batch.missing),
            }
            for batch in self.batches
        ]
        return {"output_dir": str(self.output_dir), "batches": rows, "total": self.total}

    @classmethod
    def from_json(cls, job: Mapping[str, Any], config: Mapping[str, Any]) -> BatchJob:
        """Return the job that `to_json` wrote with the same `config`."""
        pending = [
            PendingBatch(
                row["number"], tuple(BatchItem.from_json(item, config) for item in row["items"]), tuple(row["missing"])
            )
            for row in job["batches"]
        ]
        return cls(Path(job["output_dir"]), pending, job["total"])


def is_batch_run(config: Mapping[str, Any]) -> bool:
    """Return whether the run is a batch run."""
    return config["input"]["prompts"] is not None or config["batch_size"] is not None


def resolve_prompts(config: Config) -> Config:
    """Return the configuration with the file `input.prompts` replaced by its lines. Raises UsageError."""
    given = config["input"]["prompts"]
    if not isinstance(given, str):
        return config
    return {**config, "input": {**config["input"], "prompts": prompts.read_prompts(given)}}


def max_batch_size(config: Mapping[str, Any]) -> int:
    """Return the maximum pictures per batch. Without `batch_size` it is one per data-parallel rank."""
    return config["batch_size"] or config["parallel"]["data_degree"]


def iterate_lines(config: Config) -> Iterator[tuple[Line | None, Config]]:
    """Yield each line with the configuration that draws it; without a file, None with the run's own configuration."""
    lines = config["input"]["prompts"]
    if lines is None:
        yield None, config
    else:
        yield from ((line, derive_line_config(config, line)) for line in lines)


def derive_line_config(config: Config, line: Line) -> Config:
    """Return the configuration of a run that draws one line."""
    own = {name: value for name, value in line.items() if name not in (LINE, "images")}
    given = {"images": line.get("images", config["input"]["images"]), "prompts": None}
    return {**config, "sampling": {**config["sampling"], **own}, "input": given, "batch_size": max_batch_size(config)}


def count_items(config: Mapping[str, Any]) -> int:
    """Return the number of pictures of the run from lengths alone. The values may be unchecked."""
    lines, sampling = config["input"]["prompts"], config["sampling"]
    if lines is None:
        return count_pictures(sampling)
    return sum(count_pictures({**sampling, **line}) for line in lines)


def count_pictures(sampling: Mapping[str, Any]) -> int:
    """Return the number of pictures that `expand_prompts` gives."""
    prompts, seeds = (len(one) if isinstance(one, list) else None for one in (sampling["prompt"], sampling["seed"]))
    if seeds is not None:
        return seeds
    return (1 if prompts is None else prompts) * (sampling["num_images_per_prompt"] or 1)


def list_items(config: Config) -> list[BatchItem]:
    """Return every picture of the run, in the order of the lines."""
    found: list[BatchItem] = []
    for line, one in iterate_lines(config):
        for prompt, negative, seed in expand_prompts(one["sampling"]):
            alone = {"prompt": prompt, "negative_prompt": negative, "seed": seed, "num_images_per_prompt": 1}
            place = line.get(LINE) if line else None
            found.append(BatchItem(len(found), {**one["sampling"], **alone}, one["input"]["images"], place))
    return found


def expand_prompts(sampling: Mapping[str, Any]) -> list[tuple[str, str | None, int]]:
    """Return prompt, negative prompt and seed of each picture, in the order of the prompts.

    With a whole number as seed, the k-th picture of every prompt gets `seed + k`. A list has one seed per picture.
    A null prompt counts as an empty one.
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
    """Return a list unchanged, and a single text as a list of one."""
    return value if isinstance(value, list) else [value]


def group_batches(found: Sequence[BatchItem], most: int) -> list[tuple[BatchItem, ...]]:
    """Group items into batches of at most `most`, in the order of their first items.

    Items share a batch if they differ only in prompt, negative prompt and seed, and all or none have a negative prompt.
    """
    alike: dict[str, list[BatchItem]] = {}
    for item in found:
        alike.setdefault(_make_group_key(item), []).append(item)
    batches = [tuple(group[start : start + most]) for group in alike.values() for start in range(0, len(group), most)]
    return sorted(batches, key=lambda batch: batch[0].index)


def _make_group_key(item: BatchItem) -> str:
    guided = item.sampling["negative_prompt"] is not None
    common = {**item.sampling, "prompt": None, "negative_prompt": guided, "seed": None}
    return json.dumps([common, item.images], sort_keys=True)


def derive_batch_config(config: Config, batch: Sequence[BatchItem]) -> Config:
    """Return the configuration of a run that draws only this batch."""
    first = batch[0].sampling
    texts = {name: [item.sampling[name] for item in batch] for name in ("prompt", "negative_prompt", "seed")}
    if first["negative_prompt"] is None:
        texts["negative_prompt"] = None  # type: ignore[assignment]
    many = {**texts, "num_images_per_prompt": None} if len(batch) > 1 else {}
    given = {"images": batch[0].images, "prompts": None}
    plain = {"batch_size": None, "retry": 0, "fail_fast": False}
    return {**config, **plain, "sampling": {**first, **many}, "input": given}
