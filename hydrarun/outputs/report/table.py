"""Draws the table of all points: a row for each, and the columns in which at least one has a value."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from html import escape
from itertools import groupby
from typing import Any, NamedTuple

from hydrarun.outputs.report import formatting
from hydrarun.outputs.report.collect import get_number, get_value

Entry = dict[str, Any]


class TableColumn(NamedTuple):
    """A column: its group, title and unit, the function that gets its value from a point, and the formatter."""

    group: str
    title: str
    unit: str
    value: Callable[[Entry], float | str | None]
    write: Callable[[Any], str] = str


def make_number_getter(*keys: str) -> Callable[[Entry], float | None]:
    """Return a function that gets the number under these keys."""
    return lambda entry: get_number(entry, *keys)


def make_axis_getter(key: str) -> Callable[[Entry], str]:
    """Return a function that gets the value on an axis."""
    return lambda entry: entry["values"][key]


def format_status(entry: Entry) -> str:
    """Format the status of a point, with its error if any."""
    return entry["status"] if entry["error"] is None else f"{entry['status']}: {entry['error']}"


def make_nonzero_getter(*keys: str) -> Callable[[Entry], float | None]:
    """Return a function that gets the number under these keys, and None for 0, which means not applicable."""
    return lambda entry: get_number(entry, *keys) or None


def make_share_getter(part: str, whole: str) -> Callable[[Entry], float | None]:
    """Return a function that gets a share of the work, from 0 to 1."""

    def value(entry: Entry) -> float | None:
        done, every = get_number(entry, "work", part), get_number(entry, "work", whole)
        return None if done is None or not every else done / every

    return value


FIXED = (
    TableColumn(
        "seconds",
        "load",
        "s",
        make_number_getter("timings", "load_s"),
        lambda value: formatting.format_significant(value) if value else "warm",
    ),
    TableColumn("seconds", "warm-up", "s", make_nonzero_getter("timings", "warmup_s"), formatting.format_significant),
    TableColumn("seconds", "compile", "s", make_nonzero_getter("timings", "compile_s"), formatting.format_significant),
    TableColumn("seconds", "encode", "s", make_number_getter("timings", "encode_s"), formatting.format_significant),
    TableColumn("seconds", "denoise", "s", make_number_getter("timings", "denoise_s"), formatting.format_significant),
    TableColumn("seconds", "decode", "s", make_number_getter("timings", "decode_s"), formatting.format_significant),
    TableColumn("seconds", "total", "s", make_number_getter("timings", "total_s"), formatting.format_significant),
    TableColumn("a step", "first", "ms", make_number_getter("timings", "first_step_s"), formatting.format_milliseconds),
    TableColumn(
        "a step", "steady, median", "ms", make_number_getter("timings", "steady_step_s"), formatting.format_milliseconds
    ),
    TableColumn(
        "a step", "steady, mean", "ms", make_number_getter("timings", "mean_step_s"), formatting.format_milliseconds
    ),
    TableColumn("faster by", "steady", "", make_number_getter("speedup", "steady"), formatting.format_speedup),
    TableColumn("faster by", "in all", "", make_number_getter("speedup", "total"), formatting.format_speedup),
    TableColumn("work", "steps", "computed", make_share_getter("steps_computed", "steps_all")),
    TableColumn("work", "blocks", "run", make_share_getter("blocks_run", "blocks_all")),
    TableColumn(
        "peak memory", "host", "GiB", make_number_getter("memory", "peak_host_bytes"), formatting.format_gibibytes
    ),
    TableColumn(
        "peak memory", "device", "GiB", make_nonzero_getter("memory", "peak_device_bytes"), formatting.format_gibibytes
    ),
)

#: unit and formatter of each measure
MEASURES: dict[str, tuple[str, Callable[[float], str]]] = {
    "psnr": ("dB", formatting.format_decibels),
    "ssim": ("", formatting.format_ssim),
    "snr": ("dB", formatting.format_decibels),
}

LARGEST = TableColumn(
    "from the reference", "largest", "of 255 (sounds: 65535)", make_number_getter("difference", "largest")
)


def select_columns(axes: Sequence[Entry], entries: Sequence[Entry]) -> list[TableColumn]:
    """Select the columns: point, axes, status, and all others in which any point has a value."""
    settings = [TableColumn("", axis["label"], "", make_axis_getter(axis["key"])) for axis in axes]
    told = [
        *FIXED,
        *build_nearness_columns("from the reference", "difference"),
        LARGEST,
        *build_quality_columns(entries),
    ]
    filled = [column for column in told if any(column.value(entry) is not None for entry in entries)]
    return [
        TableColumn("", "point", "", lambda entry: entry["name"]),
        *settings,
        TableColumn("", "status", "", format_status),
        *filled,
    ]


def build_nearness_columns(group: str, key: str) -> Iterator[TableColumn]:
    """Yield the columns for the measures under `key`, each summarized over the outputs of a point."""
    for name, (unit, write) in MEASURES.items():
        for kind in ("mean", "p95", "worst"):
            yield TableColumn(group, f"{name.upper()} {kind}", unit, make_number_getter(key, name, kind), write)


def build_quality_columns(entries: Sequence[Entry]) -> Iterator[TableColumn]:
    """Yield the columns for `quality` of run.json: against the reference run, noise floors, and the judge."""
    yield from build_nearness_columns("from the uncached reference run", "quality")
    for name, (unit, write) in MEASURES.items():
        floors = [get_value(entry, "quality", "noise_floor", kind=dict) or {} for entry in entries]
        for floor in dict.fromkeys(key for found in floors for key in found):
            title = f"{name.upper()} {floor}"
            yield TableColumn(
                "noise floor", title, unit, make_number_getter("quality", "noise_floor", floor, name, "mean"), write
            )
    for whose, title in (("outputs", "right"), ("twins", "right, reference run")):
        yield TableColumn(
            "judged", title, "", make_number_getter("quality", "accuracy", whose), formatting.format_percent
        )


def draw_table(axes: Sequence[Entry], entries: Sequence[Entry]) -> str:
    """Return the HTML of the table."""
    shown = select_columns(axes, entries)
    spans = [(group, len(list(some))) for group, some in groupby(shown, lambda column: column.group)]
    groups = "".join(f'<th scope="colgroup" colspan="{count}">{escape(group)}</th>' for group, count in spans)
    heads = "".join(draw_column_head(place, column) for place, column in enumerate(shown))
    body = "\n".join(f"<tr>{''.join(draw_table_cell(column, entry) for column in shown)}</tr>" for entry in entries)
    return (
        f'<table class="numbers"><thead><tr class="groups">{groups}</tr>\n<tr>{heads}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table>"
    )


def draw_column_head(place: int, column: TableColumn) -> str:
    """Return the HTML of a column head: a button that sorts by the column."""
    unit = f" <small>{escape(column.unit)}</small>" if column.unit else ""
    more = ' aria-sort="ascending"' if place == 0 else ' class="number"' if column.group else ""
    return f'<th scope="col"{more}><button type="button">{escape(column.title)}{unit}</button></th>'


def draw_table_cell(column: TableColumn, entry: Entry) -> str:
    """Return the HTML of one cell, empty if there is no value."""
    value = column.value(entry)
    if column.title == "point":
        return f'<th scope="row">{escape(entry["name"])}</th>'
    if value is None:
        return "<td></td>"
    if isinstance(value, str):
        kind = ' class="bad"' if column.value is format_status and entry["error"] else ""
        return f"<td{kind}>{escape(value)}</td>"
    written = format_work_share(column, entry) or column.write(value)
    return f'<td class="number" data-value="{value!r}">{escape(written)}</td>'


def format_work_share(column: TableColumn, entry: Entry) -> str | None:
    """Format a share of the work as `7 / 24`; None for other columns."""
    if column.group != "work":
        return None
    done, every = (get_number(entry, "work", f"{column.title}_{part}") for part in (column.unit, "all"))
    return f"{done} / {every}"
