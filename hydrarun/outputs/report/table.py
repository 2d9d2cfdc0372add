"""The table of all points: a row for each, a column for what at least one of them has."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from html import escape
from itertools import groupby
from typing import Any, NamedTuple

from hydrarun.outputs.report import formatting
from hydrarun.outputs.report.collect import get_number, get_value

Entry = dict[str, Any]


class TableColumn(NamedTuple):
    """A group of columns, the title of this one, its unit, its value for a point, and how that is written."""

    group: str
    title: str
    unit: str
    value: Callable[[Entry], float | str | None]
    write: Callable[[Any], str] = str


def make_number_getter(*keys: str) -> Callable[[Entry], float | None]:
    """The number under these keys."""
    return lambda entry: get_number(entry, *keys)


def make_axis_getter(key: str) -> Callable[[Entry], str]:
    """The value on an axis."""
    return lambda entry: entry["values"][key]


def format_status(entry: Entry) -> str:
    """How the point ended."""
    return entry["status"] if entry["error"] is None else f"{entry['status']}: {entry['error']}"


def make_nonzero_getter(*keys: str) -> Callable[[Entry], float | None]:
    """The same where 0 means that there was nothing to measure."""
    return lambda entry: get_number(entry, *keys) or None


def make_share_getter(part: str, whole: str) -> Callable[[Entry], float | None]:
    """A share of the work, from 0 to 1."""

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

#: units, and how they are written
MEASURES: dict[str, tuple[str, Callable[[float], str]]] = {
    "psnr": ("dB", formatting.format_decibels),
    "ssim": ("", formatting.format_ssim),
    "snr": ("dB", formatting.format_decibels),
}

LARGEST = TableColumn(
    "from the reference", "largest", "of 255; of sounds 65535", make_number_getter("difference", "largest")
)


def select_columns(axes: Sequence[Entry], entries: Sequence[Entry]) -> list[TableColumn]:
    """Those in which some point has a value, after the values of the axes and the status."""
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
    """PSNR and SSIM of all outputs of a point, as they stand under `key`."""
    for name, (unit, write) in MEASURES.items():
        for kind in ("mean", "p95", "worst"):
            yield TableColumn(group, f"{name.upper()} {kind}", unit, make_number_getter(key, name, kind), write)


def build_quality_columns(entries: Sequence[Entry]) -> Iterator[TableColumn]:
    """What run.json says of the uncached twin, and of the noise floor beside it."""
    yield from build_nearness_columns("from the uncached twin", "quality")
    for name, (unit, write) in MEASURES.items():
        floors = [get_value(entry, "quality", "noise_floor", kind=dict) or {} for entry in entries]
        for floor in dict.fromkeys(key for found in floors for key in found):
            title = f"{name.upper()} {floor}"
            yield TableColumn(
                "noise floor", title, unit, make_number_getter("quality", "noise_floor", floor, name, "mean"), write
            )
    for whose, title in (("outputs", "right"), ("twins", "twin's right")):
        yield TableColumn(
            "judged", title, "", make_number_getter("quality", "accuracy", whose), formatting.format_percent
        )


def draw_table(axes: Sequence[Entry], entries: Sequence[Entry]) -> str:
    """The table in HTML."""
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
    """A column's head: a button that sorts by it."""
    unit = f" <small>{escape(column.unit)}</small>" if column.unit else ""
    more = ' aria-sort="ascending"' if place == 0 else ' class="number"' if column.group else ""
    return f'<th scope="col"{more}><button type="button">{escape(column.title)}{unit}</button></th>'


def draw_table_cell(column: TableColumn, entry: Entry) -> str:
    """One value; nothing where there is none."""
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
    """`7 / 24` for a share of the work."""
    if column.group != "work":
        return None
    done, every = (get_number(entry, "work", f"{column.title}_{part}") for part in (column.unit, "all"))
    return f"{done} / {every}"
