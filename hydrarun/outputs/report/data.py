"""The report as data: what report.json holds, and what the table and the plot show. docs/report.md has every key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from hydrarun.outputs.quality import metrics
from hydrarun.outputs.quality.metrics import PSNR_CAP
from hydrarun.outputs.report import command_line as repeat
from hydrarun.outputs.report import run_numbers as numbers
from hydrarun.outputs.report.axes import Axis
from hydrarun.outputs.report.collect import Output, Point, at, number
from hydrarun.outputs.report.layout import Layout
from hydrarun.outputs.report.plot import pareto
from hydrarun.outputs.report.thumbnails import Cell, Difference, Shown

FORMAT = 1  # of report.json; grows when a key changes its meaning

Entry = dict[str, Any]


def build(folder: Path, layout: Layout, cells: Mapping[Cell, Shown | str], gain: int) -> Entry:
    """What report.json holds. `folder`: the report's; `gain`: how many times differences are amplified."""
    entries = [entry(layout, number, cells) for number in range(len(layout.points))]
    by_name = {one["name"]: one for one in entries}
    for one in entries:
        there = by_name.get(one["reference"])
        if there and there is not one and one["status"] == there["status"] == "complete":
            one["speedup"] = numbers.speedup(one["timings"], there["timings"])
    front, by_twin = pareto_labels(entries), measured(entries)
    for one in entries:
        one["pareto"] = one["setting"] in front if plot_point(one, by_twin) else None
    statuses = [point.status for point in layout.points]
    return {
        "format": FORMAT,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "name": folder.resolve().name,
        "counts": {status: statuses.count(status) for status in dict.fromkeys(statuses)},
        "axes": [axis_entry(axis) for axis in layout.axes],
        "settings": [column.label for column in layout.columns],
        "amplification": gain,
        "points": entries,
    }


def axis_entry(axis: Axis) -> Entry:
    """An axis: its key, a short word for it, its values, and whether they are rows or columns of the grid."""
    return {
        "key": axis.key,
        "label": axis.short,
        "values": axis.values,
        "shown": "rows" if axis.drawn else "columns",
    }


def entry(layout: Layout, number: int, cells: Mapping[Cell, Shown | str]) -> Entry:
    """One point."""
    point = layout.points[number]
    reference, apart = compared(layout, number, cells)
    return {
        "name": point.name,
        "setting": layout.columns[layout.column_of(number)].label,
        "values": layout.values[number],
        "status": point.status,
        "error": point.error,
        "command": repeat.command(point),
        "reference": reference,
        "timings": numbers.timings(point),
        "speedup": None,
        "memory": numbers.memory(point),
        "work": numbers.work(point),
        "quality": numbers.quality(point),
        "difference": summary(list(apart.values())),
        "pareto": None,
        "outputs": [output_entry(point, output, apart.get(output.index)) for output in point.outputs],
    }


def compared(
    layout: Layout, number: int, cells: Mapping[Cell, Shown | str]
) -> tuple[str | None, dict[int, Difference]]:
    """The point that this one is compared to, and how far from it are its outputs, by their index."""
    column, names, apart = layout.column_of(number), [], {}
    for place, row in enumerate(layout.rows):
        member, output = row.cells.get(column, (None, None))
        if member != number:
            continue
        other = layout.reference(row, column)
        names += [] if other is None else [layout.points[row.cells[other][0]].name]
        shown = cells.get((place, column))
        if output and isinstance(shown, Shown) and shown.difference:
            apart[output.index] = shown.difference
    return next(iter(names), None), apart


def output_entry(point: Point, output: Output, apart: Difference | None) -> Entry:
    """One picture or video of a point; `path` is relative to the report."""
    told = apart and {"psnr": apart.psnr, "ssim": apart.ssim, "largest": apart.largest}
    return {**asdict(output), "path": point.address(output), "difference": told}


def summary(apart: Sequence[Difference]) -> Entry | None:
    """The differences of a point's outputs: PSNR in dB and SSIM as run.json sums them up, the largest of 255; and of
    how many outputs."""
    if not apart:
        return None
    alike = [one.ssim for one in apart if one.ssim is not None]
    return {
        "psnr": metrics.summary([one.psnr for one in apart]),
        "ssim": metrics.summary(alike) if alike else None,
        "largest": max(one.largest for one in apart),
        "outputs": len(apart),
    }


def measured(entries: Sequence[Entry]) -> bool:
    """Whether some point was measured against its twin; then that is the quality that counts."""
    return any(number(one, "quality", "psnr", "mean") is not None for one in entries)


def plot_point(one: Entry, by_twin: bool) -> tuple[float, float] | None:
    """Steady seconds of denoising per output, and PSNR; None where one of them is not known."""
    seconds = one["timings"]["steady_denoise_s"]
    if by_twin:
        psnr = number(one, "quality", "psnr", "mean")
    else:
        psnr = PSNR_CAP if one["reference"] == one["name"] else number(one, "difference", "psnr", "mean")
    return (seconds, psnr) if seconds and psnr is not None else None


def settings(entries: Sequence[Entry]) -> dict[str, tuple[float, float]]:
    """By setting, the means of its points' places."""
    by_twin = measured(entries)
    found: dict[str, list[tuple[float, float]]] = {}
    for one in entries:
        if where := plot_point(one, by_twin):
            found.setdefault(one["setting"], []).append(where)
    return {label: mean(places) for label, places in found.items()}


def mean(places: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The middle of some places."""
    return sum(x for x, _ in places) / len(places), sum(y for _, y in places) / len(places)


def pareto_labels(entries: Sequence[Entry]) -> set[str]:
    """The settings that no other beats in both speed and quality."""
    places = settings(entries)
    return {label for label, first in zip(places, pareto(list(places.values())), strict=True) if first}


def floors(entries: Sequence[Entry]) -> dict[str, float]:
    """By noise floor, the mean PSNR over the points that measured it."""
    found: dict[str, list[float]] = {}
    for one in entries:
        for name in at(one, "quality", "noise_floor", kind=dict) or {}:
            if (psnr := number(one, "quality", "noise_floor", name, "psnr", "mean")) is not None:
                found.setdefault(name, []).append(psnr)
    return {name: sum(values) / len(values) for name, values in found.items()}
