"""Reads the numbers of a point from run.json, by their names in report.json. Missing measurements are None."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median
from typing import Any

from hydrarun.outputs.report.collect import Point, get_number, get_value

Numbers = dict[str, float | None]

TIMINGS = ("load_s", "warmup_s", "compile_s", "encode_s", "denoise_s", "decode_s", "save_s", "total_s")


def collect_timings(point: Point) -> Numbers:
    """Return timings in seconds: those of run.json, the first step, the median of the others, and steady denoising."""
    told = {name: get_number(point.record, "timings", name) for name in TIMINGS}
    steps = filter_numbers(get_value(point.record, "timings", "steps_s", kind=list))
    return {
        **told,
        "first_step_s": steps[0] if steps else None,
        "steady_step_s": median(steps[1:]) if steps[1:] else None,
        **compute_steady_times(point, steps),
    }


def compute_steady_times(point: Point, steps: list[float]) -> Numbers:
    """Return steady seconds of denoising per output and per step. The first step includes one-time costs, so it counts
    as a usual computed step."""
    usual = filter_numbers([get_number(part, "computed_step_s") for part in list_caches(point.record)])
    made = sum(output.path is not None for output in point.outputs)
    if point.status != "complete" or not (made and steps and usual):
        return {"steady_denoise_s": None, "mean_step_s": None}
    whole = sum(steps[1:]) + median(usual)
    return {"steady_denoise_s": whole / made, "mean_step_s": whole / len(steps)}


def compute_speedup(ours: Numbers, reference: Numbers) -> Numbers:
    """Return the speedups over the reference: steady denoising, and all but loading, compiling and warm-up."""

    def ratio(there: float | None, here: float | None) -> float | None:
        return there / here if there and here else None

    return {
        "steady": ratio(reference["steady_denoise_s"], ours["steady_denoise_s"]),
        "total": ratio(compute_work_seconds(reference), compute_work_seconds(ours)),
    }


def compute_work_seconds(told: Numbers) -> float | None:
    """Return the seconds from the prompt to the files: the total without loading, warm-up and compiling."""
    total = told["total_s"]
    return None if total is None else total - sum(told[name] or 0.0 for name in ("load_s", "warmup_s", "compile_s"))


def collect_memory(point: Point) -> Numbers:
    """Return the memory peaks in bytes."""
    return {name: find_peak(point.record, name) for name in ("peak_host_bytes", "peak_device_bytes")}


def find_peak(record: dict[str, Any], name: str) -> float | None:
    """Return the peak of the run, or the highest of its batches."""
    whole = get_number(record, "memory", name)
    parts = filter_numbers(
        [get_number(batch, "memory", name) for batch in get_value(record, "batches", kind=list) or []]
    )
    return max(parts, default=None) if whole is None else whole


def count_work(point: Point) -> Numbers:
    """Count the steps that at least one branch computed and the blocks that were run, with the totals of both."""
    parts = list_caches(point.record)
    counts = [count for part in parts for count in count_steps(part)]
    run, every = (filter_numbers([get_number(part, "blocks", name) for part in parts]) for name in ("run", "all"))
    return {
        "steps_computed": sum(computed for computed, _ in counts) if counts else None,
        "steps_all": sum(all_of_them for _, all_of_them in counts) if counts else None,
        "blocks_run": sum(run) if run else None,
        "blocks_all": sum(every) if every else None,
    }


def count_steps(part: dict[str, Any]) -> Iterator[tuple[int, int]]:
    """Yield for each expert the number of steps that any branch computed, and of all steps."""
    for branches in (get_value(part, "steps", kind=dict) or {}).values():
        listed = list(branches.values()) if isinstance(branches, dict) else []
        computed, skipped = (
            {step for branch in listed for step in get_value(branch, name, kind=list) or [] if isinstance(step, int)}
            for name in ("computed", "skipped")
        )
        if listed:
            yield len(computed), len(computed | skipped)


def list_caches(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the cache records of the batches, or of the run itself if it has no batches."""
    parts = [get_value(batch, "cache", kind=dict) for batch in get_value(record, "batches", kind=list) or []]
    return [part for part in parts or [get_value(record, "cache", kind=dict)] if part]


def collect_quality(point: Point) -> dict[str, Any]:
    """Return `quality` of run.json without the folder of the reference run; empty if nothing was measured."""
    measured = get_value(point.record, "quality", kind=dict) or {}
    return {name: value for name, value in measured.items() if name != "twin"}


def filter_numbers(values: list[Any] | None) -> list[float]:
    """Return the valid numbers of a list."""
    return [value for value in values or [] if get_number({"": value}, "") is not None]
