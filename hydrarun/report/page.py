"""The page: one file with everything in it, readable without scripts, and report.json beside it."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from hydrarun import resources
from hydrarun.errors import RunError
from hydrarun.media.files import write_atomically
from hydrarun.report import data, grid, pictures, plot, table, words
from hydrarun.report.collect import Point, at
from hydrarun.report.layout import Layout
from hydrarun.report.pictures import Cell, Shown

Entry = dict[str, Any]

PAGE, DATA = "report.html", "report.json"


def write(folder: Path, layout: Layout) -> Path:
    """Write both files into `folder`; returns the page's path. Raises RunError where that is not possible."""
    cells = pictures.show(layout)
    gain = pictures.gain(cells.values())
    report = data.build(folder, layout, cells, gain)
    try:
        write_atomically(
            folder / DATA, json.dumps(report, indent=2, ensure_ascii=False).encode(errors="replace") + b"\n"
        )
        write_atomically(folder / PAGE, html(report, layout, cells).encode(errors="replace"))
    except OSError as error:
        raise RunError(f"report: {folder}: cannot be written: {error.strerror}") from None
    return folder / PAGE


def html(report: Entry, layout: Layout, cells: dict[Cell, Shown | str]) -> str:
    """The whole page."""
    style, script, page = (part(f"page.{kind}") for kind in ("css", "js", "html"))
    entries, axes, gain = report["points"], report["axes"], report["amplification"]
    return Template(page).substitute(
        title=escape(title(layout)),
        style=style,
        style_hash=digest(style),
        script=script,
        script_hash=digest(script),
        counts=counts(report),
        facts="".join(facts(layout)),
        prompt=prompt(layout),
        switch=switch(cells, gain),
        grid=grid.draw(layout, cells, gain, entries),
        notes="".join(f"<li>{note}</li>" for note in notes(layout, cells, gain)),
        plot=draw_plot(entries),
        table=table.draw(axes, entries),
        commands="\n".join(command(entry) for entry in entries),
        gain=gain,
    )


def part(name: str) -> str:
    """One of the files that the page is made of."""
    return (resources.PACKAGE / "report" / name).read_text(encoding="utf-8")


def digest(text: str) -> str:
    """What the page's own policy knows a script or a style by: no other is run."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def title(layout: Layout) -> str:
    """The models, and what is swept."""
    models = distinct(layout.points, "config", "model", "name") or ["hydrarun"]
    swept = " × ".join(axis.short for axis in layout.axes)
    return f"{', '.join(models)}: {swept}" if swept else ", ".join(models)


def counts(report: Entry) -> str:
    """How many points there are, and how they ended."""
    told = [
        f'<span class="{"good" if status == "complete" else "bad"}">{number} {status}</span>'
        for status, number in report["counts"].items()
    ]
    return " · ".join([words.count(len(report["points"]), "point"), *told])


def facts(layout: Layout) -> Iterator[str]:
    """What was run and with what, as a list; values that are not the same for all points are all named."""
    for axis in layout.axes:
        values = "".join(f"<li>{escape(value)}</li>" for value in axis.values)
        yield f'<div class="axis"><dt>{escape(axis.key)}</dt><dd><ul>{values}</ul></dd></div>'
    points = layout.points
    machine = [*distinct(points, "hardware", "gpu"), *distinct(points, "hardware", "cpu")]
    versions = [
        f"{name} {', '.join(found)}"
        for name in ("hydrarun", "torch", "diffusers", "cache-dit", "python")
        if (found := distinct(points, "versions", name))
    ]
    dates = sorted(date[:16].replace("T", " ") for date in distinct(points, "created"))
    when = f"{dates[0]} to {dates[-1]} UTC" if len(set(dates)) > 1 else f"{dates[0]} UTC" if dates else ""
    listed = {
        "weights": ", ".join(distinct(points, "weights", "path")),
        "device": ", ".join([*distinct(points, "device"), *machine]),
        "numbers": ", ".join(distinct(points, "dtype")),
        "versions": ", ".join(versions),
        "drawn": when,
    }
    for name, value in listed.items():
        if value:
            yield f"<div><dt>{name}</dt><dd>{escape(value)}</dd></div>"


def distinct(points: Sequence[Point], *keys: str) -> list[str]:
    """The texts under `keys`, each once."""
    return list(dict.fromkeys(value for point in points if (value := at(point.record, *keys, kind=str))))


def prompt(layout: Layout) -> str:
    """The prompt, where it is one for all."""
    common = grid.common_prompt(layout)
    return f'<p class="said">{escape(common)}</p>' if common else ""


def switch(cells: dict[Cell, Shown | str], gain: int) -> str:
    """Pictures or differences, where there are some."""
    if not any(isinstance(cell, Shown) and cell.difference for cell in cells.values()):
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


def notes(layout: Layout, cells: dict[Cell, Shown | str], gain: int) -> Iterator[str]:
    """What a reader must know about the grid."""
    shown = [cell for cell in cells.values() if isinstance(cell, Shown)]
    if any(cell.difference for cell in shown):
        yield (
            f"A difference is |a − b| of the pixels, ×{gain} for the eye, against the reference in the same row; of a video,"
            " its middle frame. Its PSNR and its largest value are of all pixels, as they are in the files."
        )
    elif len(layout.points) > 1:
        yield "Nothing is compared: no point without cache and quantization has a picture (--reference NAME chooses another)."
    if any(cell.reduced for cell in shown):
        yield "Shown smaller than they are; a picture in full view links to its file."
    if len(layout.rows) > pictures.most_rows(layout):
        yield (
            f"The first {pictures.most_rows(layout)} of {len(layout.rows)} rows. The others are in report.json, without"
            " differences."
        )


def draw_plot(entries: Sequence[Entry]) -> str:
    """Speed against quality, and what both are; or why there is no plot."""
    places = data.settings(entries)
    if len(places) < 2:
        return "<p>Needs at least two settings with times and a PSNR: a reference to compare with, or report.metrics=[psnr].</p>"
    by_twin = data.measured(entries)
    marks = [
        plot.Mark(
            label,
            middle,
            [
                (one["name"], where)
                for one in entries
                if one["setting"] == label and (where := data.place(one, by_twin))
            ],
        )
        for label, middle in places.items()
    ]
    against = "its uncached twin" if by_twin else "the reference in the same row, computed from the files"
    return (
        f"<figure>{plot.draw(marks, data.floors(entries), 'PSNR, dB ↑ nearer')}<figcaption>Across: seconds of denoising for one output,"
        " the first step counted as a usual one. Up: PSNR of the output against "
        f"{against}. A mark is a setting, the mean of its points (small dots). The filled ones are the Pareto front: no"
        " other is as fast and as near.</figcaption></figure>"
    )


def command(entry: Entry) -> str:
    """A point and how to repeat it."""
    if entry["command"] is None:
        return ""
    values = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in entry["values"].items())
    return (
        f'<li id="command-{escape(entry["name"])}"><span>{escape(entry["name"])}</span><span>{escape(values)}</span>'
        f'<code>{escape(entry["command"])}</code><button type="button" class="copy">Copy</button></li>'
    )
