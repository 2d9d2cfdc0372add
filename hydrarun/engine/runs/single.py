"""A single run: draws its configuration as one batch, and writes its files and run.json."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydrarun.core.errors import RunError, WriteError
from hydrarun.core.timing import Timings
from hydrarun.engine.runner import Runner, make_pictures
from hydrarun.engine.runs.quality import MeasuredQuality, follow_measuring, measure_quality
from hydrarun.outputs.media.images import InputImage
from hydrarun.outputs.writer import OutputWriter, Picture


def run_single(runner: Runner, config: dict[str, Any], output_dir: Path) -> dict[str, Any]:
    """Draw `config` with the loaded model, write into `output_dir` and return the content of run.json."""
    start = time.perf_counter()
    timings = Timings(runner.built.parts.device)
    given = runner.read_images(config)
    facts = {**runner.collect_facts(), "inputs": [describe_image(image) for image in given]}
    writer = OutputWriter(output_dir, config, facts, config["output"]["metadata"])
    results: dict[str, Any] = {}
    try:
        runner.warm_up(config, given, timings)
        drawn = make_pictures(runner.draw(runner.prepare_state(config, given), timings, config["cache"]))
        save_pictures(runner, drawn, writer, runner.summarize_timings(timings, start))
        results = runner.collect_results(timings, start)  # of the run alone, before anything else is drawn
        if config["report"]["metrics"]:
            measured = measure_quality(runner, config, given, drawn, writer.facts, results)
            results = add_quality(results, measured)
            for index, record in enumerate(writer.outputs):
                record.update(measured.of_output(index))
    except BaseException as error:  # Ctrl-C and a full disk too: keep what was written, and record it in run.json
        with suppress(WriteError):
            writer.fail(error, results or runner.collect_results(timings, start))
        raise
    record = writer.finish(results)
    runner.progress.table(record, output_dir)
    return record


def follow_single(runner: Runner, config: dict[str, Any]) -> None:
    """Run this rank's part of a run that rank 0 writes."""
    given = runner.read_images(config)
    timings = Timings(runner.built.parts.device)
    runner.warm_up(config, given, timings)
    runner.draw(runner.prepare_state(config, given), timings, config["cache"])
    if config["report"]["metrics"]:
        follow_measuring(runner, config, given)


def save_pictures(runner: Runner, drawn: list[Picture], writer: OutputWriter, timings: dict[str, Any]) -> None:
    """Write every picture that can be written, then raise the first error. A full disk ends it at once."""
    refused: list[RunError] = []
    with runner.progress.phase("saving", total=len(drawn)) as advance:
        for picture in drawn:
            try:
                writer.save(**vars(picture), timings=timings)
            except WriteError as error:
                raise WriteError(f"{error}; {len(writer.outputs)} of {len(drawn)} are saved") from None
            except RunError as error:
                refused.append(error)
            advance()
    if refused:
        raise refused[0]


def add_quality(results: dict[str, Any], measured: MeasuredQuality) -> dict[str, Any]:
    """Return `results` with the measured quality."""
    timings = {**results["timings"], "quality_s": measured.seconds}
    return {**results, "timings": timings, "quality": measured.quality}


def describe_image(image: InputImage) -> dict[str, Any]:
    """Return what run.json records about an input image."""
    return {"path": str(image.path), "sha256": image.sha256, "width": image.image.width, "height": image.image.height}
