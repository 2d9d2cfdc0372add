"""Writes the page, a single self-contained file that works without scripts, and report.json next to it."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from hydrarun.core.errors import RunError
from hydrarun.core.files import write_atomically
from hydrarun.outputs.media.kinds import KINDS
from hydrarun.outputs.report import data, formatting, grid, plot, table, thumbnails
from hydrarun.outputs.report.collect import Point, get_number, get_value
from hydrarun.outputs.report.layout import GridLayout
from hydrarun.outputs.report.thumbnails import Cell, CellMedia

Entry = dict[str, Any]

PAGE, DATA = "report.html", "report.json"


def write_page(folder: Path, layout: GridLayout) -> Path:
    """Write both files into `folder`; returns the path of the page. Raises RunError if they cannot be written."""
    cells = thumbnails.build_cells(layout)
    gain = thumbnails.choose_gain(cells.values())
    report = data.build_report(folder, layout, cells, gain)
    try:
        write_atomically(
            folder / DATA, json.dumps(report, indent=2, ensure_ascii=False).encode(errors="replace") + b"\n"
        )
        write_atomically(folder / PAGE, build_html(report, layout, cells).encode(errors="replace"))
    except OSError as error:
        raise RunError(f"report: {folder}: cannot be written: {error.strerror}") from None
    return folder / PAGE


def build_html(report: Entry, layout: GridLayout, cells: dict[Cell, CellMedia | str]) -> str:
    """Return the HTML of the whole page."""
    style, script, page = (read_page_file(f"page.{kind}") for kind in ("css", "js", "html"))
    entries, axes, gain = report["points"], report["axes"], report["amplification"]
    return Template(page).substitute(
        title=escape(format_title(layout)),
        style=style,
        style_hash=hash_for_csp(style),
        script=script,
        script_hash=hash_for_csp(script),
        counts=format_counts(report),
        facts="".join(list_facts(layout)),
        prompt=find_prompt(layout),
        switch=draw_switch(cells, gain),
        grid=grid.draw_grid(layout, cells, gain, entries),
        notes="".join(f"<li>{note}</li>" for note in list_notes(layout, cells, gain)),
        plot=draw_plot(entries),
        table=table.draw_table(axes, entries),
        commands="\n".join(draw_command(entry) for entry in entries),
        gain=gain,
    )


def read_page_file(name: str) -> str:
    """Read one of the source files of the page."""
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def hash_for_csp(text: str) -> str:
    """Return the hash that allows a script or style in the content security policy of the page."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def format_title(layout: GridLayout) -> str:
    """Format the title: the models and the axes of the sweep."""
    models = list_distinct(layout.points, "config", "model", "name") or ["hydrarun"]
    swept = " × ".join(axis.short for axis in layout.axes)
    return f"{', '.join(models)}: {swept}" if swept else ", ".join(models)


def format_counts(report: Entry) -> str:
    """Format the number of points, in total and by status."""
    told = [
        f'<span class="{"good" if status == "complete" else "bad"}">{number} {status}</span>'
        for status, number in report["counts"].items()
    ]
    return " · ".join([formatting.format_count(len(report["points"]), "point"), *told])


def list_facts(layout: GridLayout) -> Iterator[str]:
    """Yield the HTML of the facts about the runs; where points differ, all values are listed."""
    for axis in layout.axes:
        values = "".join(f"<li>{escape(value)}</li>" for value in axis.values)
        yield f'<div class="axis"><dt>{escape(axis.key)}</dt><dd><ul>{values}</ul></dd></div>'
    points = layout.points
    threads = [
        formatting.format_count(int(one), "torch thread") for one in list_distinct(points, "hardware", "torch_threads")
    ]
    machine = [found for name in ("gpu", "cpu") for found in list_distinct(points, "hardware", name)]
    versions = [
        f"{name} {', '.join(found)}"
        for name in ("hydrarun", "torch", "diffusers", "cache-dit", "python")
        if (found := list_distinct(points, "versions", name))
    ]
    dates = sorted({date[:16].replace("T", " ") for date in list_distinct(points, "created")})
    listed = {
        "weights": list_distinct(points, "weights", "path"),
        "size": format_sizes(points),
        "steps": list_distinct(points, "config", "sampling", "num_inference_steps"),
        "device": [*list_distinct(points, "device"), *machine, *threads],
        "dtype": list_distinct(points, "dtype"),
        "versions": versions,
        "drawn, UTC": [" to ".join([dates[0], dates[-1]] if dates[1:] else dates)] if dates else [],
    }
    for name, told in listed.items():
        if told:
            yield f"<div><dt>{name}</dt><dd>{escape(', '.join(told))}</dd></div>"


def format_sizes(points: Sequence[Point]) -> list[str]:
    """Return the distinct sizes of all outputs."""
    found = {}
    for point in points:
        for output in get_value(point.record, "outputs", kind=list) or []:
            width, height = (get_value(output, name, kind=int) for name in ("width", "height"))
            counts = ((get_value(output, kind.parts, kind=int), kind.parts) for kind in KINDS if kind.parts)
            parts = "".join(f", {count} {name}" for count, name in counts if count)
            seconds = get_number(output, "duration_s")
            found[f"{width}×{height}{parts}"] = width and height
            found[f"{seconds} s"] = seconds
    return [size for size, known in found.items() if known]


def list_distinct(points: Sequence[Point], *keys: str) -> list[str]:
    """Return the distinct texts and integers under `keys` in the records."""
    values = (get_value(point.record, *keys, kind=(str, int)) for point in points)
    return list(dict.fromkeys(str(value) for value in values if value is not None))


def find_prompt(layout: GridLayout) -> str:
    """Return the HTML of the prompt if all rows share it, else nothing."""
    common = grid.find_common_prompt(layout)
    return f'<p class="said">{escape(common)}</p>' if common else ""


def draw_switch(cells: dict[Cell, CellMedia | str], gain: int) -> str:
    """Return the HTML of the switch between pictures and differences, empty if there are no differences."""
    if not any(isinstance(cell, CellMedia) and cell.difference for cell in cells.values()):
        return ""
    options = (("pictures", "Pictures", " checked"), ("differences", f"Differences ×{gain}", ""))
    return (
        '<div class="switch" role="radiogroup" aria-label="what the grid shows">'
        + "".join(
            f'<input type="radio" name="show" id="show-{name}"{on}><label for="show-{name}">{text}</label>'
            for name, text, on in options
        )
        + "</div>"
    )


def list_notes(layout: GridLayout, cells: dict[Cell, CellMedia | str], gain: int) -> Iterator[str]:
    """Yield the notes that explain the grid."""
    shown = [cell for cell in cells.values() if isinstance(cell, CellMedia)]
    if any(cell.difference for cell in shown):
        yield (
            f"A difference picture shows |a − b| of each pixel, amplified ×{gain}, against the reference in the same"
            " row; for a video, of the middle frame. PSNR and largest difference cover all pixels of the files."
        )
        yield (
            "Under a picture: mean steady time of a step, speedup over the reference, PSNR and SSIM (against the"
            " uncached reference run if that was measured). Above a column: steady seconds per output, speedup, PSNR"
            " (means)."
        )
    elif len(layout.columns) > 1:
        yield (
            "Nothing is compared: no row has a picture without cache and quantization to compare others with"
            " (--reference NAME chooses another reference)."
        )
    if any(cell.reduced for cell in shown):
        yield "Pictures are small, compressed copies; numbers are of the original files, which the full view links to."
    if len(layout.rows) > thumbnails.count_shown_rows(layout):
        yield (
            f"Only the first {thumbnails.count_shown_rows(layout)} of {len(layout.rows)} rows are shown."
            " The others are in report.json, without differences."
        )


def draw_plot(entries: Sequence[Entry]) -> str:
    """Return the HTML of the plot of speed and quality with its caption, or the reason why there is none."""
    places = data.average_settings(entries)
    if len(places) < 2:
        return (
            "<p>Needs at least two settings with timings and a PSNR: choose a reference with --reference, or run with"
            " report.metrics=[psnr].</p>"
        )
    by_twin = data.has_measured_quality(entries)
    against = "its uncached reference run" if by_twin else "the reference in the same row, computed from the files"
    drawn = plot.draw_svg(list(build_marks(entries, by_twin)), data.average_noise_floors(entries), "PSNR, dB ↑ closer")
    return (
        f"<figure>{drawn}<figcaption>Horizontal: steady seconds of denoising per output; the first step counts as a"
        f" usual computed step. Vertical: PSNR of the output against {against}. A mark is a setting, at the mean of its"
        " points (small dots). Filled marks are the Pareto front: no other setting is as fast and as close."
        "</figcaption></figure>"
    )


def build_marks(entries: Sequence[Entry], by_twin: bool) -> Iterator[plot.PlotMark]:
    """Yield the marks of the plot: settings with their points."""
    for label, middle in data.average_settings(entries).items():
        own = [(one["name"], data.find_plot_point(one, by_twin)) for one in entries if one["setting"] == label]
        yield plot.PlotMark(label, middle, [(name, where) for name, where in own if where])


def draw_command(entry: Entry) -> str:
    """Return the HTML of the command that repeats a point, empty if there is none."""
    if entry["command"] is None:
        return ""
    told = {key: value for key, value in entry["values"].items() if key != "sampling.prompt"}  # the command shows it
    values = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in told.items())
    return (
        f'<li id="command-{escape(entry["name"])}"><span>{escape(entry["name"])}</span><span>{escape(values)}</span>'
        f'<code>{escape(entry["command"])}</code><button type="button" class="copy">Copy</button></li>'
    )
