"""Measures a run against its uncached, unquantized twin, and how far apart such runs are anyway: the noise floor.

What is drawn for it is drawn on every rank, in one order; rank 0 alone knows whether the twin is on disk.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from hydrarun.acceleration.quantization import NoQuantization
from hydrarun.core.distributed import collectives
from hydrarun.core.errors import OutOfMemoryError, RunError
from hydrarun.engine.build import make_backends
from hydrarun.engine.runs import reference
from hydrarun.models.layers.attention import AttentionBackend
from hydrarun.outputs.media.images import InputImage
from hydrarun.outputs.provenance import redact_config
from hydrarun.outputs.quality.metrics import compare_outputs, measure_accuracy, summarize_measures

if TYPE_CHECKING:
    from hydrarun.engine.runner import Runner
    from hydrarun.outputs.writer import Picture


class ReferenceDraw(NamedTuple):
    """What was drawn without a cache, and the keys of run.json that say how."""

    name: str
    pictures: list[Picture]
    results: dict[str, Any]


@dataclass
class QualityReport:
    """The twin's pixels, the prompts, and what is measured."""

    twin: list[np.ndarray]
    prompts: list[str]
    metrics: list[str]

    def each(self, drawn: Sequence[Picture]) -> list[dict[str, float]]:
        """The measures of each pair."""
        return [compare_outputs(ours.pixels, twin, self.metrics) for ours, twin in zip(drawn, self.twin, strict=True)]

    def block(self, drawn: Sequence[Picture], each: Sequence[Mapping[str, float]]) -> dict[str, Any]:
        """The measures of all together; `each`: those of each pair."""
        block = summarize_measures(each, self.metrics)
        if "accuracy" in self.metrics:
            shares = {"outputs": [picture.pixels for picture in drawn], "twins": self.twin}
            block["accuracy"] = {name: measure_accuracy(pixels, self.prompts) for name, pixels in shares.items()}
            block["accuracy"]["count"] = len(drawn)
        return block


class MeasuredQuality(NamedTuple):
    """What run.json says of a run's quality, and of that of each of its outputs."""

    quality: dict[str, Any]
    seconds: float
    #: {measure: number}; and by the entries of the noise floor the same
    each: list[dict[str, float]]
    floor: dict[str, list[dict[str, float]]]

    def of_output(self, index: int) -> dict[str, Any]:
        """The keys of the record of one output."""
        floor = {name: numbers[index] for name, numbers in self.floor.items() if numbers[index]}
        own = {"quality": self.each[index], "noise_floor": floor}
        return {key: numbers for key, numbers in own.items() if numbers}


def measure_quality(
    runner: Runner,
    config: dict[str, Any],
    given: list[InputImage],
    ours: list[Picture],
    facts: Mapping[str, Any],
    results: dict[str, Any],
) -> MeasuredQuality:
    """Compare what a run drew with its twin. `facts` and `results`: as `OutputWriter` has and takes them.

    On rank 0, while the others `follow_measuring`. Raises RunError for a twin that cannot be drawn or kept.
    """
    start = time.perf_counter()
    facts = {**facts, "quantization": NoQuantization.name}
    place, twin, note = reference.find_reference_dir(config), reference.read_reference(config, facts), "kept"
    if config == reference.strip_accelerations(config):
        if twin is None:
            reference.save_reference(config, facts, ours, results)
        twin, note = [picture.pixels for picture in ours], "this run itself, kept"
    others = draw_references(runner, config, given, twin is None)
    if twin is None:
        made = next(others)
        reference.save_reference(config, facts, made.pictures, made.results)
        twin, note = [picture.pixels for picture in made.pictures], "made, kept"
    runner.progress.note(f"the uncached twin: {note} in {place}")

    yardstick = QualityReport(twin, [picture.prompt for picture in ours], config["report"]["metrics"])
    each = yardstick.each(ours)
    quality = {**redact_config({"twin": str(place)}), **yardstick.block(ours, each)}
    floor, blocks = {}, {}
    for draw in others:
        floor[draw.name] = yardstick.each(draw.pictures)
        blocks[draw.name] = yardstick.block(draw.pictures, floor[draw.name])
    if blocks:
        quality["noise_floor"] = blocks
    return MeasuredQuality(quality, time.perf_counter() - start, each, floor)


def follow_measuring(runner: Runner, config: dict[str, Any], given: list[InputImage]) -> None:
    """Do this rank's part of what rank 0 draws to `measure`."""
    for _ in draw_references(runner, config, given, False):
        pass


def draw_references(
    runner: Runner, config: dict[str, Any], given: list[InputImage], twin: bool
) -> Iterator[ReferenceDraw]:
    """The twin, if rank 0 needs it, then the noise floor; in the same order on every rank."""
    twin, others = broadcast_decision(runner, twin), make_backends(config)
    if not (twin or others):
        return
    with load_unquantized(runner, config) as plain:
        if twin:
            runner.progress.note("drawing the uncached twin")
            yield ReferenceDraw("twin", *plain.redraw(config, given, reference.make_no_cache_node()))
        for name, backend in others.items():
            runner.progress.note(f"drawing for the noise floor: {name}")
            with use_attention(plain, backend):
                draw = ReferenceDraw(name, *plain.redraw(config, given, reference.make_no_cache_node()))
            yield draw


@contextmanager
def load_unquantized(runner: Runner, config: dict[str, Any]) -> Iterator[Runner]:
    """A runner with the weights as they are loaded: this one, or, while the block runs, a second one beside it.

    Raises RunError where the device has no room for both.
    """
    plain = reference.strip_accelerations(config)
    if plain["quantization"] == config["quantization"]:
        yield runner
        return
    runner.progress.note("loading the weights once more, unquantized: the uncached twin has those")
    try:
        second = type(runner)(plain, runner.progress, str(runner.built.parts.device))
        try:
            yield second
        finally:
            second.close()
    except OutOfMemoryError:
        raise RunError(
            "the unquantized weights do not fit beside the quantized ones: draw the twin first, by the same command"
            " with quantization=none"
        ) from None


def broadcast_decision(runner: Runner, mine: bool) -> bool:
    """Rank 0's answer, on every rank; the others' is False."""
    parts = runner.built.parts
    if parts.mesh is None:
        return mine
    answers = collectives.all_reduce(torch.tensor([int(mine)], device=parts.device), collectives.get_world_group())
    return bool(answers.item())


@contextmanager
def use_attention(runner: Runner, backend: AttentionBackend | None) -> Iterator[None]:
    """The transformers with another attention while the block runs."""
    transformers = list(runner.built.parts.experts)
    try:
        for transformer in transformers:
            transformer.set_attention_backend(backend or runner.built.attention)
        yield
    finally:
        for transformer in transformers:
            transformer.set_attention_backend(runner.built.attention)
