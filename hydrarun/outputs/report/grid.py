"""Draws the grid of pictures: a row for each prompt and seed, a column for each setting."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any
from urllib.parse import quote

from hydrarun.outputs.report import formatting
from hydrarun.outputs.report.collect import Output, get_number
from hydrarun.outputs.report.layout import GridColumn, GridLayout, GridRow
from hydrarun.outputs.report.thumbnails import (
    Cell,
    CellMedia,
    OutputDifference,
    count_shown_rows,
    encode_difference_uri,
)

Entry = dict[str, Any]


def draw_grid(layout: GridLayout, cells: Mapping[Cell, CellMedia | str], gain: int, entries: Sequence[Entry]) -> str:
    """Return the HTML of the grid."""
    compared = {entry["reference"] for entry in entries if entry["reference"] != entry["name"]}
    heads = "".join(
        draw_column_head(column, [entries[point] for point in column.points], compared) for column in layout.columns
    )
    rows = []
    for place, row in enumerate(layout.rows[: count_shown_rows(layout)]):
        drawn = [draw_cell(layout, cells, gain, entries, (place, column)) for column in range(len(layout.columns))]
        name = f'<th scope="row">{format_row_name(layout, row)}</th>'
        rows.append(f"<tr>{name}{''.join(drawn)}</tr>")
    kind = "grid single" if len(layout.columns) == 1 else "grid"
    return (
        f'<table class="{kind}"><thead><tr><td></td>{heads}</tr></thead>\n<tbody>\n'
        + "\n".join(rows)
        + "\n</tbody></table>"
    )


def draw_column_head(column: GridColumn, entries: Sequence[Entry], compared: set[str | None]) -> str:
    """Return a column head: label, and mean time, speedup and PSNR of its points. `compared`: names of references."""
    reference = bool(compared & {entry["name"] for entry in entries})
    means = [
        format_mean(
            entries, ("timings", "steady_denoise_s"), lambda value: f"{formatting.format_significant(value)} s"
        ),
        format_mean(entries, ("speedup", "steady"), formatting.format_speedup),
        format_mean(entries, ("difference", "psnr", "mean"), lambda value: formatting.format_decibels(value, " dB")),
    ]
    told = " · ".join(text for text in means if text)
    mark = '<span class="tag">reference</span>' if reference else ""
    return f'<th scope="col"><b>{escape(column.label)}</b>{mark}<small>{told}</small></th>'


def format_mean(entries: Sequence[Entry], keys: tuple[str, ...], write: Any) -> str:
    """Format the mean of a number over the points that have it; empty if none has."""
    values = [value for entry in entries if (value := get_number(entry, *keys)) is not None]
    return write(sum(values) / len(values)) if values else ""


def format_row_name(layout: GridLayout, row: GridRow) -> str:
    """Return the HTML that names a row: seed, other values, and the prompt if it differs between rows."""
    parts = [f"<b>{escape(text)}</b>" for text in row.others]
    if row.seed is not None:
        parts.insert(0, f"<b>seed {escape(row.seed)}</b>")
    if row.prompt and not find_common_prompt(layout):
        parts.append(f'<span class="prompt">{escape(row.prompt)}</span>')
    return "".join(parts)


def find_common_prompt(layout: GridLayout) -> str | None:
    """Return the prompt if all rows have the same, else None."""
    prompts = {row.prompt for row in layout.rows}
    return prompts.pop() if len(prompts) == 1 else None


def draw_cell(
    layout: GridLayout, cells: Mapping[Cell, CellMedia | str], gain: int, entries: Sequence[Entry], place: Cell
) -> str:
    """Return the HTML of one cell: the output with its numbers, or the error."""
    row, column = layout.rows[place[0]], place[1]
    if column not in row.cells:
        return "<td></td>"
    number, output = row.cells[column]
    found, entry = cells.get(place), entries[number]
    if output is None:  # a complete point may have fewer outputs than others
        return draw_failed_cell(entry["status"], entry["error"]) if entry["error"] else "<td></td>"
    if not isinstance(found, CellMedia):
        return draw_failed_cell("failed", output.error or found or "")
    reference = layout.reference(row, column)
    compared = "" if reference in (None, column) else f' data-reference="cell-{place[0]}-{reference}"'
    name = f"{layout.columns[column].label}, {format_row_title(row)}"
    file = layout.points[number].address(output) or ""
    if found.difference:
        compared += f' data-difference="{format_difference(found.difference)}"'
    return (
        f'<td><figure id="cell-{place[0]}-{column}" data-name="{escape(name)}"{compared}'
        f' data-point="{escape(entry["name"])}" data-size="{found.size[0]}×{found.size[1]}">'
        f"{draw_media(found, file, name, gain)}"
        f"<figcaption>{draw_caption(entry, output, found)}</figcaption></figure></td>"
    )


def format_row_title(row: GridRow) -> str:
    """Format seed and other values of a row in one line."""
    seed = [] if row.seed is None else [f"seed {row.seed}"]
    return ", ".join([*seed, *row.others])


def draw_media(found: CellMedia, file: str, name: str, gain: int) -> str:
    """Return the HTML of the picture with a link to its file, the player, and the difference picture."""
    still = f'<img class="picture" src="{found.image}" alt="{escape(name)}"{format_pixelated_class(found)}>'
    apart = ""
    if found.difference:
        source, text = encode_difference_uri(found.difference, gain), f"difference from the reference, {name}"
        apart = f'<img class="difference" src="{source}" alt="{escape(text)}"{format_pixelated_class(found)}>'
    if found.sound is not None:
        link = f'<a href="{quote(os.fsencode(file))}" title="full view">{still}{apart}</a>'
        return f'{link}<audio controls preload="metadata" src="{found.sound}"></audio>'
    if found.video is None:
        return f'<a href="{quote(os.fsencode(file))}" title="full view">{still}{apart}</a>'
    link = f'<a href="{quote(os.fsencode(file))}">{still}{apart}<span>full view</span></a>'
    return f'<video controls loop muted playsinline poster="{found.image}" src="{found.video}"></video>{link}'


def format_pixelated_class(found: CellMedia) -> str:
    """Return the attribute that makes the full view enlarge a small picture without smoothing."""
    return ' data-small=""' if max(found.size) <= 256 else ""


def draw_caption(entry: Entry, output: Output, found: CellMedia) -> str:
    """Return the caption of a cell: speed and quality, where known."""
    speed = get_number(entry, "timings", "mean_step_s")
    factor = get_number(entry, "speedup", "steady")
    parts = [
        f"{formatting.format_milliseconds(speed)} ms/step" if speed else "",
        formatting.format_speedup(factor) if factor else "",
    ]
    return f"<span>{' · '.join(filter(None, parts))}</span><span>{format_nearness(output, found)}</span>"


def format_nearness(output: Output, found: CellMedia) -> str:
    """Format PSNR, SNR and SSIM against the reference run where measured, else against the reference in the row."""
    measured: dict[str, Any] = output.quality or (vars(found.difference) if found.difference else {})
    parts = [formatting.format_decibels(measured["psnr"], " dB")] if measured.get("psnr") is not None else []
    parts += [f"SNR {formatting.format_decibels(measured['snr'], ' dB')}"] if measured.get("snr") is not None else []
    parts += [f"SSIM {formatting.format_ssim(measured['ssim'])}"] if measured.get("ssim") is not None else []
    return " · ".join(parts)


def format_difference(apart: OutputDifference) -> str:
    """Format a difference as text."""
    if apart.largest == 0:
        return "no difference from the reference"
    psnr = formatting.format_decibels(apart.psnr, " dB")
    return f"from the reference: {psnr}, largest {apart.largest} of {apart.levels}"


def draw_failed_cell(status: str, error: str) -> str:
    """Return the HTML of a cell without an output."""
    return f'<td><div class="failed"><b>{escape(status)}</b><p>{escape(error)}</p></div></td>'
