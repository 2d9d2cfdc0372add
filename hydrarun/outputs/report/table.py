"""The table of all points: a row for each, a column for what at least one of them has."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from html import escape
from itertools import groupby
from typing import Any, NamedTuple

from hydrarun.outputs.report import formatting as words
from hydrarun.outputs.report.collect import at, number

Entry = dict[str, Any]


class Column(NamedTuple):
    """A group of columns, the title of this one, its unit, its value for a point, and how that is written."""

    group: str
    title: str
    unit: str
    value: Callable[[Entry], float | str | None]
    write: Callable[[Any], str] = str


def under(*keys: str) -> Callable[[Entry], float | None]:
    """The number under these keys."""
    return lambda entry: number(entry, *keys)


def chosen(key: str) -> Callable[[Entry], str]:
    """The value on an axis."""
    return lambda entry: entry["values"][key]


def ended(entry: Entry) -> str:
    """How the point ended."""
    return entry["status"] if entry["error"] is None else f"{entry['status']}: {entry['error']}"


def happened(*keys: str) -> Callable[[Entry], float | None]:
    """The same where 0 means that there was nothing to measure."""
    return lambda entry: number(entry, *keys) or None


def of(part: str, whole: str) -> Callable[[Entry], float | None]:
    """A share of the work, from 0 to 1."""

    def value(entry: Entry) -> float | None:
        done, every = number(entry, "work", part), number(entry, "work", whole)
        return None if done is None or not every else done / every

    return value


FIXED = (
    Column(
        "seconds", "load", "s", under("timings", "load_s"), lambda value: words.significant(value) if value else "warm"
    ),
    Column("seconds", "warm-up", "s", happened("timings", "warmup_s"), words.significant),
    Column("seconds", "compile", "s", happened("timings", "compile_s"), words.significant),
    Column("seconds", "encode", "s", under("timings", "encode_s"), words.significant),
    Column("seconds", "denoise", "s", under("timings", "denoise_s"), words.significant),
    Column("seconds", "decode", "s", under("timings", "decode_s"), words.significant),
    Column("seconds", "total", "s", under("timings", "total_s"), words.significant),
    Column("a step", "first", "ms", under("timings", "first_step_s"), words.milliseconds),
    Column("a step", "steady, median", "ms", under("timings", "steady_step_s"), words.milliseconds),
    Column("a step", "steady, mean", "ms", under("timings", "mean_step_s"), words.milliseconds),
    Column("faster by", "steady", "", under("speedup", "steady"), words.times),
    Column("faster by", "in all", "", under("speedup", "total"), words.times),
    Column("work", "steps", "computed", of("steps_computed", "steps_all")),
    Column("work", "blocks", "run", of("blocks_run", "blocks_all")),
    Column("peak memory", "host", "GiB", under("memory", "peak_host_bytes"), words.gibibytes),
    Column("peak memory", "device", "GiB", happened("memory", "peak_device_bytes"), words.gibibytes),
)

#: units, and how they are written
MEASURES: dict[str, tuple[str, Callable[[float], str]]] = {
    "psnr": ("dB", words.decibels),
    "ssim": ("", words.share),
    "snr": ("dB", words.decibels),
}

LARGEST = Column("from the reference", "largest", "of 255; of sounds 65535", under("difference", "largest"))


def columns(axes: Sequence[Entry], entries: Sequence[Entry]) -> list[Column]:
    """Those in which some point has a value, after the values of the axes and the status."""
    settings = [Column("", axis["label"], "", chosen(axis["key"])) for axis in axes]
    told = [*FIXED, *nearness("from the reference", "difference"), LARGEST, *qualities(entries)]
    filled = [column for column in told if any(column.value(entry) is not None for entry in entries)]
    return [Column("", "point", "", lambda entry: entry["name"]), *settings, Column("", "status", "", ended), *filled]


def nearness(group: str, key: str) -> Iterator[Column]:
    """PSNR and SSIM of all outputs of a point, as they stand under `key`."""
    for name, (unit, write) in MEASURES.items():
        for kind in ("mean", "p95", "worst"):
            yield Column(group, f"{name.upper()} {kind}", unit, under(key, name, kind), write)


def qualities(entries: Sequence[Entry]) -> Iterator[Column]:
    """What run.json says of the uncached twin, and of the noise floor beside it."""
    yield from nearness("from the uncached twin", "quality")
    for name, (unit, write) in MEASURES.items():
        floors = [at(entry, "quality", "noise_floor", kind=dict) or {} for entry in entries]
        for floor in dict.fromkeys(key for found in floors for key in found):
            title = f"{name.upper()} {floor}"
            yield Column("noise floor", title, unit, under("quality", "noise_floor", floor, name, "mean"), write)
    for whose, title in (("outputs", "right"), ("twins", "twin's right")):
        yield Column("judged", title, "", under("quality", "accuracy", whose), words.percent)


def draw(axes: Sequence[Entry], entries: Sequence[Entry]) -> str:
    """The table in HTML."""
    shown = columns(axes, entries)
    spans = [(group, len(list(some))) for group, some in groupby(shown, lambda column: column.group)]
    groups = "".join(f'<th scope="colgroup" colspan="{count}">{escape(group)}</th>' for group, count in spans)
    heads = "".join(head(place, column) for place, column in enumerate(shown))
    body = "\n".join(f"<tr>{''.join(cell(column, entry) for column in shown)}</tr>" for entry in entries)
    return (
        f'<table class="numbers"><thead><tr class="groups">{groups}</tr>\n<tr>{heads}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table>"
    )


def head(place: int, column: Column) -> str:
    """A column's head: a button that sorts by it."""
    unit = f" <small>{escape(column.unit)}</small>" if column.unit else ""
    more = ' aria-sort="ascending"' if place == 0 else ' class="number"' if column.group else ""
    return f'<th scope="col"{more}><button type="button">{escape(column.title)}{unit}</button></th>'


def cell(column: Column, entry: Entry) -> str:
    """One value; nothing where there is none."""
    value = column.value(entry)
    if column.title == "point":
        return f'<th scope="row">{escape(entry["name"])}</th>'
    if value is None:
        return "<td></td>"
    if isinstance(value, str):
        kind = ' class="bad"' if column.value is ended and entry["error"] else ""
        return f"<td{kind}>{escape(value)}</td>"
    return f'<td class="number" data-value="{value!r}">{escape(counted(column, entry) or column.write(value))}</td>'


def counted(column: Column, entry: Entry) -> str | None:
    """`7 / 24` for a share of the work."""
    if column.group != "work":
        return None
    done, every = (number(entry, "work", f"{column.title}_{part}") for part in (column.unit, "all"))
    return f"{done} / {every}"
