"""Builds the data of the report: report.json, the table and the plot. docs/report.md lists all keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from hydrarun.outputs.quality import metrics
from hydrarun.outputs.quality.metrics import PSNR_CAP
from hydrarun.outputs.report import command_line, run_numbers
from hydrarun.outputs.report.axes import Axis
from hydrarun.outputs.report.collect import Output, Point, get_number, get_value
from hydrarun.outputs.report.layout import GridLayout
from hydrarun.outputs.report.plot import find_pareto_front
from hydrarun.outputs.report.thumbnails import Cell, CellMedia, OutputDifference

FORMAT = 1  # of report.json; incremented when a key changes its meaning

Entry = dict[str, Any]


def build_report(folder: Path, layout: GridLayout, cells: Mapping[Cell, CellMedia | str], gain: int) -> Entry:
    """Build the content of report.json. `folder`: of the report; `gain`: amplification of the differences."""
    entries = [build_point_entry(layout, number, cells) for number in range(len(layout.points))]
    by_name = {one["name"]: one for one in entries}
    for one in entries:
        there = by_name.get(one["reference"])
        if there and there is not one and one["status"] == there["status"] == "complete":
            one["speedup"] = run_numbers.compute_speedup(one["timings"], there["timings"])
    front, by_twin = find_pareto_labels(entries), has_measured_quality(entries)
    for one in entries:
        one["pareto"] = one["setting"] in front if find_plot_point(one, by_twin) else None
    statuses = [point.status for point in layout.points]
    return {
        "format": FORMAT,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "name": folder.resolve().name,
        "counts": {status: statuses.count(status) for status in dict.fromkeys(statuses)},
        "axes": [build_axis_entry(axis) for axis in layout.axes],
        "settings": [column.label for column in layout.columns],
        "amplification": gain,
        "points": entries,
    }


def build_axis_entry(axis: Axis) -> Entry:
    """Build the entry of an axis: key, short label, values, and whether they are rows or columns of the grid."""
    return {
        "key": axis.key,
        "label": axis.short,
        "values": axis.values,
        "shown": "rows" if axis.drawn else "columns",
    }


def build_point_entry(layout: GridLayout, number: int, cells: Mapping[Cell, CellMedia | str]) -> Entry:
    """Build the entry of one point."""
    point = layout.points[number]
    reference, apart = compare_to_reference(layout, number, cells)
    return {
        "name": point.name,
        "setting": layout.columns[layout.column_of(number)].label,
        "values": layout.values[number],
        "status": point.status,
        "error": point.error,
        "command": command_line.format_command(point),
        "reference": reference,
        "timings": run_numbers.collect_timings(point),
        "speedup": None,
        "memory": run_numbers.collect_memory(point),
        "work": run_numbers.count_work(point),
        "quality": run_numbers.collect_quality(point),
        "difference": summarize_differences(list(apart.values())),
        "pareto": None,
        "outputs": [build_output_entry(point, output, apart.get(output.index)) for output in point.outputs],
    }


def compare_to_reference(
    layout: GridLayout, number: int, cells: Mapping[Cell, CellMedia | str]
) -> tuple[str | None, dict[int, OutputDifference]]:
    """Return the name of the reference point of this point, and the differences of its outputs by index."""
    column, names, apart = layout.column_of(number), [], {}
    for place, row in enumerate(layout.rows):
        member, output = row.cells.get(column, (None, None))
        if member != number:
            continue
        other = layout.reference(row, column)
        names += [] if other is None else [layout.points[row.cells[other][0]].name]
        shown = cells.get((place, column))
        if output and isinstance(shown, CellMedia) and shown.difference:
            apart[output.index] = shown.difference
    return next(iter(names), None), apart


def build_output_entry(point: Point, output: Output, apart: OutputDifference | None) -> Entry:
    """Build the entry of one output of a point; `path` is relative to the report."""
    told = apart and {"psnr": apart.psnr, "ssim": apart.ssim, "largest": apart.largest}
    return {**asdict(output), "path": point.address(output), "difference": told}


def summarize_differences(apart: Sequence[OutputDifference]) -> Entry | None:
    """Summarize the differences of a point's outputs: PSNR (dB) and SSIM summarized as in run.json, the largest
    difference, and the number of outputs."""
    if not apart:
        return None
    alike = [one.ssim for one in apart if one.ssim is not None]
    return {
        "psnr": metrics.summarize_values([one.psnr for one in apart]),
        "ssim": metrics.summarize_values(alike) if alike else None,
        "largest": max(one.largest for one in apart),
        "outputs": len(apart),
    }


def has_measured_quality(entries: Sequence[Entry]) -> bool:
    """Return whether any point was measured against its reference run; that measure then replaces `difference`."""
    return any(get_number(one, "quality", "psnr", "mean") is not None for one in entries)


def find_plot_point(one: Entry, by_twin: bool) -> tuple[float, float] | None:
    """Return steady seconds of denoising per output, and PSNR in dB; None if either is unknown."""
    seconds = one["timings"]["steady_denoise_s"]
    if by_twin:
        psnr = get_number(one, "quality", "psnr", "mean")
    else:
        psnr = PSNR_CAP if one["reference"] == one["name"] else get_number(one, "difference", "psnr", "mean")
    return (seconds, psnr) if seconds and psnr is not None else None


def average_settings(entries: Sequence[Entry]) -> dict[str, tuple[float, float]]:
    """Return the mean plot position of the points of each setting, by label."""
    by_twin = has_measured_quality(entries)
    found: dict[str, list[tuple[float, float]]] = {}
    for one in entries:
        if where := find_plot_point(one, by_twin):
            found.setdefault(one["setting"], []).append(where)
    return {label: average_places(places) for label, places in found.items()}


def average_places(places: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return the mean of plot positions."""
    return sum(x for x, _ in places) / len(places), sum(y for _, y in places) / len(places)


def find_pareto_labels(entries: Sequence[Entry]) -> set[str]:
    """Return the labels of the settings on the Pareto front of speed and quality."""
    places = average_settings(entries)
    return {label for label, first in zip(places, find_pareto_front(list(places.values())), strict=True) if first}


def average_noise_floors(entries: Sequence[Entry]) -> dict[str, float]:
    """Return the mean PSNR of each noise floor over the points that measured it, by name."""
    found: dict[str, list[float]] = {}
    for one in entries:
        for name in get_value(one, "quality", "noise_floor", kind=dict) or {}:
            if (psnr := get_number(one, "quality", "noise_floor", name, "psnr", "mean")) is not None:
                found.setdefault(name, []).append(psnr)
    return {name: sum(values) / len(values) for name, values in found.items()}
