"""Measures a run against its reference run (uncached, unquantized), and the noise floor: how far such runs differ.

Every rank draws in the same order. Only rank 0 knows whether the reference run is on disk.
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
    """Pictures that were drawn without a cache, and their results by the keys of run.json."""

    name: str
    pictures: list[Picture]
    results: dict[str, Any]


@dataclass
class QualityReport:
    """The reference run's pixels, the prompts, and the metrics to compute."""

    baseline: list[np.ndarray]
    prompts: list[str]
    metrics: list[str]

    def each(self, drawn: Sequence[Picture]) -> list[dict[str, float]]:
        """Return the measures of each pair."""
        return [
            compare_outputs(ours.pixels, baseline, self.metrics)
            for ours, baseline in zip(drawn, self.baseline, strict=True)
        ]

    def block(self, drawn: Sequence[Picture], each: Sequence[Mapping[str, float]]) -> dict[str, Any]:
        """Return the measures of all pictures together. `each`: those of each pair."""
        block = summarize_measures(each, self.metrics)
        if "accuracy" in self.metrics:
            shares = {"outputs": [picture.pixels for picture in drawn], "twins": self.baseline}
            block["accuracy"] = {name: measure_accuracy(pixels, self.prompts) for name, pixels in shares.items()}
            block["accuracy"]["count"] = len(drawn)
        return block


class MeasuredQuality(NamedTuple):
    """The quality of a run and of each of its outputs, as in run.json."""

    quality: dict[str, Any]
    seconds: float
    #: {measure: number} for each output; in `floor`, for each entry of the noise floor too
    each: list[dict[str, float]]
    floor: dict[str, list[dict[str, float]]]

    def of_output(self, index: int) -> dict[str, Any]:
        """Return the quality keys of the record of one output."""
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
    """Compare a run's pictures with its reference run. `facts` and `results`: as for `OutputWriter`.

    Rank 0 calls it while the others call `follow_measuring`. Raises RunError if the reference run cannot be drawn or
    kept.
    """
    start = time.perf_counter()
    facts = {**facts, "quantization": NoQuantization.name}
    place, baseline, note = reference.find_reference_dir(config), reference.read_reference(config, facts), "kept"
    if config == reference.strip_accelerations(config):
        if baseline is None:
            reference.save_reference(config, facts, ours, results)
        baseline, note = [picture.pixels for picture in ours], "this run itself, kept"
    others = draw_references(runner, config, given, baseline is None)
    if baseline is None:
        made = next(others)
        reference.save_reference(config, facts, made.pictures, made.results)
        baseline, note = [picture.pixels for picture in made.pictures], "made, kept"
    runner.progress.note(f"the reference run: {note} in {place}")

    report = QualityReport(baseline, [picture.prompt for picture in ours], config["report"]["metrics"])
    each = report.each(ours)
    quality = {**redact_config({"twin": str(place)}), **report.block(ours, each)}
    floor, blocks = {}, {}
    for draw in others:
        floor[draw.name] = report.each(draw.pictures)
        blocks[draw.name] = report.block(draw.pictures, floor[draw.name])
    if blocks:
        quality["noise_floor"] = blocks
    return MeasuredQuality(quality, time.perf_counter() - start, each, floor)


def follow_measuring(runner: Runner, config: dict[str, Any], given: list[InputImage]) -> None:
    """Draw this rank's part of the runs that rank 0 measures (`measure_quality`)."""
    for _ in draw_references(runner, config, given, False):
        pass


def draw_references(
    runner: Runner, config: dict[str, Any], given: list[InputImage], baseline: bool
) -> Iterator[ReferenceDraw]:
    """Draw the reference run if rank 0 needs it, then the noise floor, in the same order on every rank."""
    baseline, others = broadcast_decision(runner, baseline), make_backends(config)
    if not (baseline or others):
        return
    with load_unquantized(runner, config) as plain:
        if baseline:
            runner.progress.note("drawing the reference run")
            yield ReferenceDraw("twin", *plain.redraw(config, given, reference.make_no_cache_node()))
        for name, backend in others.items():
            runner.progress.note(f"drawing for the noise floor: {name}")
            with use_attention(plain, backend):
                draw = ReferenceDraw(name, *plain.redraw(config, given, reference.make_no_cache_node()))
            yield draw


@contextmanager
def load_unquantized(runner: Runner, config: dict[str, Any]) -> Iterator[Runner]:
    """Yield a runner with unquantized weights: this one, or a second one that exists while the block runs.

    Raises RunError if the device has no memory for both.
    """
    plain = reference.strip_accelerations(config)
    if plain["quantization"] == config["quantization"]:
        yield runner
        return
    runner.progress.note("loading the unquantized weights too, for the reference run")
    try:
        second = type(runner)(plain, runner.progress, str(runner.built.parts.device))
        try:
            yield second
        finally:
            second.close()
    except OutOfMemoryError:
        raise RunError(
            "the unquantized weights do not fit next to the quantized ones: draw the reference run first, with the same"
            " command and quantization=none"
        ) from None


def broadcast_decision(runner: Runner, mine: bool) -> bool:
    """Return rank 0's answer on every rank. The others pass False."""
    parts = runner.built.parts
    if parts.mesh is None:
        return mine
    answers = collectives.all_reduce(torch.tensor([int(mine)], device=parts.device), collectives.get_world_group())
    return bool(answers.item())


@contextmanager
def use_attention(runner: Runner, backend: AttentionBackend | None) -> Iterator[None]:
    """Use another attention in the transformers while the block runs. None keeps the runner's own."""
    transformers = list(runner.built.parts.experts)
    try:
        for transformer in transformers:
            transformer.set_attention_backend(backend or runner.built.attention)
        yield
    finally:
        for transformer in transformers:
            transformer.set_attention_backend(runner.built.attention)
