"""One rank's side of a run of batches: draws the batches that the driver sends. Rank 0 writes files and ledger rows."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from hydrarun.config.batches import BatchJob, Config, PendingBatch, derive_batch_config
from hydrarun.core.device import HOST
from hydrarun.core.distributed.rank import rank_info
from hydrarun.core.errors import RunError, WriteError
from hydrarun.core.timing import Timings
from hydrarun.engine.runner import Runner, make_pictures
from hydrarun.engine.runs.batch_ledger import describe_failure
from hydrarun.engine.runs.quality import follow_measuring, measure_quality
from hydrarun.engine.runs.single import add_quality, describe_image
from hydrarun.outputs.journal import append_row
from hydrarun.outputs.media.images import InputImage
from hydrarun.outputs.provenance import redact_config
from hydrarun.outputs.run_folder import LEDGER_FILE
from hydrarun.outputs.writer import OutputWriter, Picture
from hydrarun.pipeline.stage import Stage
from hydrarun.pipeline.state import State

#: number of batches whose prompts are encoded before an offloaded text encoder leaves the device
ENCODED_AHEAD = 32


class EncodedBatch(NamedTuple):
    """A batch with encoded prompts. `config`: that of a run of this batch alone."""

    batch: PendingBatch
    config: Config
    images: list[InputImage]
    state: State
    #: this rank's share of `state`
    local_state: State
    timings: Timings
    #: seconds that encoding took
    seconds: float


def draw_batches(runner: Runner, config: Config, job: BatchJob) -> None:
    """Draw the batches of `job`, a part of the run of `config`.

    A picture that cannot be written is recorded as failed, and the others are drawn. Any other error ends the job.
    """
    writer = BatchWriter(runner, job, config["fail_fast"]) if rank_info().rank == 0 else None
    offloaded = "text_encoder" in runner.built.parts.offload.moves
    size = ENCODED_AHEAD if offloaded else 1
    for start in range(0, len(job.batches), size):
        group = job.batches[start : start + size]
        encoded = [encode_batch(runner, config, batch, writer, batch is job.batches[0]) for batch in group]
        for batch in encoded:
            draw_batch(runner, batch, writer)


def encode_batch(
    runner: Runner, config: Config, batch: PendingBatch, writer: BatchWriter | None, warm_up: bool
) -> EncodedBatch:
    """Encode a batch's prompts and keep the result in host memory. `warm_up`: whether to warm up before."""
    own_config = derive_batch_config(config, batch.items)
    timings = Timings(runner.built.parts.device)
    start = time.perf_counter()
    if writer:
        writer.record_start(batch)
    images = runner.read_images(own_config)
    if warm_up:
        runner.warm_up(own_config, images, timings)
    state = runner.prepare_state(own_config, images)
    local_state = runner.local_shard(state)
    runner.run_stages(select_encoding(runner.built.stages), state, local_state, timings, own_config["cache"])
    move_state(local_state, HOST)
    return EncodedBatch(batch, own_config, images, state, local_state, timings, time.perf_counter() - start)


def draw_batch(runner: Runner, encoded: EncodedBatch, writer: BatchWriter | None) -> None:
    """Run the stages after the encoding. Rank 0 writes the pictures, the others take part in measuring them."""
    start = time.perf_counter() - encoded.seconds
    if writer:
        writer.record_start(encoded.batch)
        runner.progress.note(writer.format_title(encoded.batch))
    state, local_state = encoded.state, encoded.local_state
    move_state(local_state, runner.built.parts.device)
    stages = runner.built.stages
    rest = stages[len(select_encoding(stages)) :]
    runner.run_stages(rest, state, local_state, encoded.timings, encoded.config["cache"])
    drawn = make_pictures(runner.gather(state, local_state))
    if writer:
        writer.write_batch(encoded, drawn, start)
    elif encoded.config["report"]["metrics"]:
        follow_measuring(runner, encoded.config, encoded.images)
    runner.reset_stats()


def select_encoding(stages: Sequence[Stage]) -> Sequence[Stage]:
    """Return the first stages, up to the last one that uses the text encoder."""
    last = max((place for place, stage in enumerate(stages) if "text_encoder" in stage.uses), default=-1)
    return stages[: last + 1]


def move_state(state: State, device: torch.device) -> None:
    """Move the tensors that stages have set in `state` to `device`."""
    for name in State.stage_fields():
        value = getattr(state, name)
        setattr(state, name, tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, value))


class BatchWriter:
    """Writes rank 0's files and ledger rows. Appends rows without reading any: the driver reads the ledger."""

    def __init__(self, runner: Runner, job: BatchJob, fail_fast: bool) -> None:
        """Record that this process is ready to draw, with its facts and loading times."""
        self.runner = runner
        self.job = job
        self.fail_fast = fail_fast
        self.last_row: dict[str, Any] = {}
        loading = {"load_s": runner.load_s, **runner.summarize_reads(), "total_s": runner.load_s}
        self.add_row(
            "begun",
            {"facts": redact_config(runner.collect_facts()), "timings": loading, "memory": runner.measure_memory()},
        )
        runner.reset_stats()

    def add_row(self, kind: str, content: Any) -> None:
        """Append a row to the ledger."""
        self.last_row = {kind: content}
        append_row(self.job.output_dir / LEDGER_FILE, self.last_row)

    def record_start(self, batch: PendingBatch) -> None:
        """Record that a batch starts. If the process ends without another row, this batch failed."""
        indices = [item.index for item in batch.items]
        if self.last_row != {"drawing": indices}:
            self.add_row("drawing", indices)

    def format_title(self, batch: PendingBatch) -> str:
        """Return the line that announces a batch."""
        pairs = [(item.sampling["prompt"][:60], item.sampling["seed"]) for item in batch.items[:3]]
        texts = ", ".join(f"{prompt!r} (seed {seed})" for prompt, seed in pairs)
        more = f" and {len(batch.items) - 3} more" if len(batch.items) > 3 else ""
        return f"[{batch.number + 1}/{self.job.total}] {texts}{more}"

    def write_batch(self, encoded: EncodedBatch, drawn: list[Picture], start: float) -> None:
        """Write a batch's pictures, measure them, and record the results."""
        runner, config = self.runner, encoded.config
        facts = {**runner.collect_facts(), "inputs": [describe_image(image) for image in encoded.images]}
        indices = [item.index for item in encoded.batch.items]
        writer = OutputWriter(self.job.output_dir, config, facts, config["output"]["metadata"], indices)
        timings = runner.summarize_timings(encoded.timings, start)
        refused = list(self.write_pictures(writer, encoded.batch, drawn, timings))
        results = runner.collect_results(encoded.timings, start)
        if config["report"]["metrics"]:
            measured = measure_quality(runner, config, encoded.images, drawn, writer.facts, results)
            results = add_quality(results, measured)
            for record in writer.outputs:
                record.update(measured.of_output(indices.index(record["index"])))
                self.add_row("done", record)
        results["timings"]["save_s"] = writer.save_s
        made = [record["index"] for record in writer.outputs]
        self.add_row("drawn", {"outputs": made, **results, "inputs": writer.facts["inputs"]})
        if refused and self.fail_fast:
            raise refused[0]

    def write_pictures(
        self, writer: OutputWriter, batch: PendingBatch, drawn: list[Picture], timings: Any
    ) -> Iterator[RunError]:
        """Write each missing picture; yield the errors of those that cannot be written."""
        for item, picture in zip(batch.items, drawn, strict=True):
            if item.index not in batch.missing:
                writer.skip()
                continue
            try:
                self.add_row("done", writer.save(**vars(picture), timings=timings))
            except WriteError:
                raise
            except RunError as error:
                self.add_row("failed", describe_failure([item.index], error))
                self.runner.progress.note(str(error))
                yield error
