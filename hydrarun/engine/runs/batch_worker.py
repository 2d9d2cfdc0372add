"""A run of batches on one rank: draws those that are left, and keeps what became of each picture in the ledger."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from hydrarun.config import batches
from hydrarun.config.batches import Config, Item
from hydrarun.core.device import HOST
from hydrarun.core.distributed.rank import rank_info
from hydrarun.core.errors import RunError
from hydrarun.core.timing import Timings
from hydrarun.engine.runner import Runner, pictures
from hydrarun.engine.runs.batch_ledger import Book
from hydrarun.engine.runs.quality import follow_measuring, measure
from hydrarun.engine.runs.single import describe_image, with_quality
from hydrarun.outputs.media.images import InputImage
from hydrarun.outputs.provenance import redact
from hydrarun.outputs.writer import OutputWriter, Picture
from hydrarun.pipeline.stage import Stage
from hydrarun.pipeline.state import State

#: batches whose prompts are encoded one after the other, before the text encoder leaves the device
AHEAD = 32


class Begun(NamedTuple):
    """A batch whose prompts are encoded."""

    number: int
    config: Config
    items: Sequence[Item]
    given: list[InputImage]
    state: State
    own: State
    timings: Timings
    seconds: float


def draw(runner: Runner, config: Config, folder: Path, left: Mapping[str, Sequence[int]]) -> None:
    """Draw batches of the run that `config` asks for. `left`: by their numbers, their pictures that are not there yet.

    A picture that cannot be written is kept as failed, and the others go on; what else fails ends it.
    """
    every = batches.together(batches.items(config), batches.limit(config))
    todo = [(int(number), every[int(number)]) for number in left]
    keep = Keeper(runner, Book(folder, config), left, len(every)) if rank_info().rank == 0 else None
    moves = "text_encoder" in runner.built.parts.offload.moves
    size = AHEAD if moves else 1
    for start in range(0, len(todo), size):
        begun = [begin(runner, config, *batch, keep, first=batch == todo[0]) for batch in todo[start : start + size]]
        for batch in begun:
            finish(runner, batch, keep)


def begin(
    runner: Runner, config: Config, number: int, items: Sequence[Item], keep: Keeper | None, first: bool
) -> Begun:
    """Encode a batch's prompts; what comes of it waits on the host. Before the `first` is where a run warms up."""
    own_config = batches.configuration(config, items)
    timings = Timings(runner.built.parts.device)
    start = time.perf_counter()
    if keep:
        keep.drawing(items)
    given = runner.read_images(own_config)
    if first:
        runner.warm_up(own_config, given, timings)
    state = runner.state(own_config, given)
    own = runner.own(state)
    runner.play(encoding(runner.built.stages), state, own, timings, own_config["cache"])
    move(own, HOST)
    return Begun(number, own_config, items, given, state, own, timings, time.perf_counter() - start)


def finish(runner: Runner, batch: Begun, keep: Keeper | None) -> None:
    """Draw a batch whose prompts are encoded; on rank 0 its pictures are written."""
    start = time.perf_counter() - batch.seconds
    if keep:
        keep.drawing(batch.items)
        runner.progress.note(keep.title(batch))
    move(batch.own, runner.built.parts.device)
    stages = runner.built.stages
    runner.play(stages[len(encoding(stages)) :], batch.state, batch.own, batch.timings, batch.config["cache"])
    drawn = pictures(runner.whole(batch.state, batch.own))
    if keep:
        keep.batch(batch, drawn, start)
    elif batch.config["report"]["metrics"]:
        follow_measuring(runner, batch.config, batch.given)
    runner.again()


def encoding(stages: Sequence[Stage]) -> Sequence[Stage]:
    """The first stages, up to the last one that computes with the text encoder."""
    last = max((place for place, stage in enumerate(stages) if "text_encoder" in stage.uses), default=-1)
    return stages[: last + 1]


def move(state: State, device: torch.device) -> None:
    """Take what stages gave to the device."""
    for name in State.stage_fields():
        given = getattr(state, name)
        setattr(state, name, tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, given))


class Keeper:
    """Writes pictures and rows of the ledger, on rank 0."""

    def __init__(self, runner: Runner, book: Book, left: Mapping[str, Sequence[int]], count: int) -> None:
        self.runner = runner
        self.book = book
        self.left = left
        self.count = count
        loading = {"load_s": runner.load_s, **runner.read(), "total_s": runner.load_s}
        book.add("begun", {"facts": redact(runner.facts()), "timings": loading, "memory": runner.memory()})
        runner.again()

    def drawing(self, items: Sequence[Item]) -> None:
        """Keep that these are begun: if nothing more is heard of them, they are what failed."""
        row = {"drawing": [item.index for item in items]}
        if self.book.ledger.rows[-1] != row:
            self.book.ledger.add(row)

    def title(self, batch: Begun) -> str:
        """A line about a batch that is drawn now."""
        pairs = [(item.sampling["prompt"][:60], item.sampling["seed"]) for item in batch.items[:3]]
        texts = ", ".join(f"{prompt!r} (seed {seed})" for prompt, seed in pairs)
        more = f" and {len(batch.items) - 3} more" if len(batch.items) > 3 else ""
        return f"[{batch.number + 1}/{self.count}] {texts}{more}"

    def batch(self, batch: Begun, drawn: list[Picture], start: float) -> None:
        """Write a batch's pictures, measure them, and keep what became of them."""
        runner = self.runner
        facts = {**runner.facts(), "inputs": [describe_image(image) for image in batch.given]}
        places = [item.index for item in batch.items]
        metadata = batch.config["output"]["metadata"]
        writer = OutputWriter(self.book.folder, batch.config, facts, metadata, places)
        refused = list(self.save(writer, batch, drawn, runner.measured(batch.timings, start)))
        results = runner.results(batch.timings, start)
        if batch.config["report"]["metrics"]:
            measured = measure(runner, batch.config, batch.given, drawn, writer.facts, results)
            results = with_quality(results, measured)
            for record in writer.outputs:
                record.update(measured.of_output(places.index(record["index"])))
                self.book.add("done", record)
        results["timings"]["save_s"] = writer.save_s
        made = [record["index"] for record in writer.outputs]
        self.book.add("drawn", {"outputs": made, **results, "inputs": writer.facts["inputs"]})
        if refused and batch.config["fail_fast"]:
            raise refused[0]

    def save(self, writer: OutputWriter, batch: Begun, drawn: list[Picture], timings: Any) -> Iterator[RunError]:
        """Write each picture that is not there yet and can be; the errors of the others."""
        wanted = self.left[str(batch.number)]
        for item, picture in zip(batch.items, drawn, strict=True):
            if item.index not in wanted:
                writer.skip()
                continue
            try:
                self.book.add("done", writer.save(**vars(picture), timings=timings))
            except RunError as error:
                self.book.fail([item.index], error)
                self.runner.progress.note(str(error))
                yield error
