"""The layout of the grid: a row for each prompt and seed, a column for each setting, and the reference cells."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from hydrarun.core import resources
from hydrarun.core.errors import UsageError, suggest_name
from hydrarun.outputs.report import axes
from hydrarun.outputs.report.axes import Axis, Values
from hydrarun.outputs.report.collect import Output, Point, get_value


@dataclass
class GridColumn:
    """One setting, shared by points that differ only in what they draw."""

    label: str
    points: list[int] = field(default_factory=list)


@dataclass
class GridRow:
    """The outputs with the same prompt, seed and values of other axes that set what is drawn (`others`).

    `cells`: by column, the point and its output; None if the point has no output for this row.
    """

    prompt: str | None
    seed: str | None
    others: list[str]
    cells: dict[int, tuple[int, Output | None]] = field(default_factory=dict)


@dataclass
class GridLayout:
    """The grid. Points are identified by their index in `points`, columns by their index in `columns`."""

    points: list[Point]
    axes: list[Axis]
    values: list[Values]  # for each point
    columns: list[GridColumn]
    rows: list[GridRow]
    chosen: int | None  # the column that the user chose to compare with

    def column_of(self, point: int) -> int:
        """Return the column of a point."""
        return next(number for number, column in enumerate(self.columns) if point in column.points)

    def reference(self, row: GridRow, column: int) -> int | None:
        """Return the column to compare `column` with in this row (itself if it is the reference), or None.

        This is the column that the user chose, or the first without cache and quantization; it must have an output of
        the same model in this row.
        """
        if column not in row.cells:
            return None
        model = find_model_name(self.points[row.cells[column][0]])
        for number in range(len(self.columns)) if self.chosen is None else [self.chosen]:
            place, output = row.cells.get(number, (0, None))
            if output is None or output.path is None or find_model_name(self.points[place]) != model:
                continue
            if self.chosen is not None or is_unaccelerated(self.points[place].config):
                return number
        return None


def arrange_grid(points: list[Point], reference: str | None) -> GridLayout:
    """Arrange points as a grid. Raises UsageError if `reference` is neither a column label nor a point name."""
    found, values = axes.find_axes(points)
    columns = build_columns(points, found, values)
    layout = GridLayout(points, found, values, columns, [], find_chosen_column(points, columns, reference))
    layout.rows = list(build_rows(layout))
    return layout


def build_columns(points: Sequence[Point], found: Sequence[Axis], values: Sequence[Values]) -> list[GridColumn]:
    """Group points by setting, in the order of their first points. Points equal in everything get separate columns."""
    drawing = [axis for axis in found if not axis.drawn]
    columns: dict[tuple[str, int], GridColumn] = {}
    alike: Counter[tuple[str, ...]] = Counter()
    for number, chosen in enumerate(values):
        everything = tuple(chosen.values())
        again = alike[everything]
        alike[everything] += 1
        name = axes.format_label(drawing, chosen) or find_model_name(points[number]) or "all"
        column = GridColumn(f"{name} #{again + 1}" if again else name)
        columns.setdefault((name, again), column).points.append(number)
    return list(columns.values())


def build_rows(layout: GridLayout) -> Iterable[GridRow]:
    """Yield the rows in the order of the points. A point without outputs appears in every row it should have filled."""
    drawn = [axis for axis in layout.axes if axis.drawn]
    blocks: dict[tuple[str, ...], list[int]] = {}
    for number, values in enumerate(layout.values):
        blocks.setdefault(tuple(values[axis.key] for axis in drawn), []).append(number)
    for members in blocks.values():
        values = layout.values[members[0]]
        others = [axes.format_axis_value(axis, values[axis.key]) for axis in drawn if axis.key not in SHOWN]
        yield from _build_block_rows(layout, members, others, values)


#: keys that a row shows anyway
SHOWN = ("sampling.prompt", "sampling.seed")


def _build_block_rows(
    layout: GridLayout, members: Sequence[int], others: list[str], values: Values
) -> Iterable[GridRow]:
    """Build the rows of points that draw the same."""
    rows: dict[tuple[str, int | None, int], GridRow] = {}
    for member in members:
        column, seen = layout.column_of(member), Counter[tuple[str, int | None]]()
        for output in layout.points[member].outputs:
            which = (output.prompt, output.seed)
            key = (*which, seen[which])
            seen[which] += 1
            seed = None if output.seed is None else str(output.seed)
            row = rows.setdefault(key, GridRow(output.prompt, seed, others))
            row.cells[column] = (member, output)
    if not rows:
        sampling = get_value(layout.points[members[0]].config, "sampling", kind=dict) or {}
        prompt, seed = (_find_sampling_value(values, sampling, name) for name in ("prompt", "seed"))
        rows["", None, 0] = GridRow(prompt, seed, others)
    for row in rows.values():
        for member in members:
            row.cells.setdefault(layout.column_of(member), (member, None))
    return rows.values()


def _find_sampling_value(values: Values, sampling: Mapping[str, Any], name: str) -> str | None:
    """Return a field of `sampling` as text: its value on an axis, or else in the configuration; None if unset."""
    told = values.get(f"sampling.{name}")
    return told if told is not None or sampling.get(name) is None else axes.format_value(sampling[name])


def find_chosen_column(points: Sequence[Point], columns: Sequence[GridColumn], name: str | None) -> int | None:
    """Return the column that `--reference` names by its label or a point in it; None if not given."""
    if name is None:
        return None
    for number, column in enumerate(columns):
        if name == column.label or name in (points[member].name for member in column.points):
            return number
    labels = [column.label for column in columns]
    raise UsageError(
        f"report: --reference {name}: no such setting and no such point.{suggest_name(name, labels)}"
        f" Settings: {'; '.join(labels)}"
    )


def is_unaccelerated(config: Mapping[str, Any]) -> bool:
    """Return whether a configuration has neither cache nor quantization."""
    return all(config.get(group) == load_none_option(group) for group in ("cache", "quantization"))


@cache
def load_none_option(group: str) -> Any:
    """Return the config node of the option `none` of a group."""
    return resources.read_options(group)["none"]


def find_model_name(point: Point) -> str | None:
    """Return the name of the model, None if not on record."""
    return get_value(point.config, "model", "name", kind=str)
