"""Compares every model with every acceleration with the plain run: each cell of the tables in docs/matrix.md.

`pytest tests/test_matrix.py --write-matrix` (`make matrix`) writes the tables. `matrix.KINDS` has the tolerances.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hydrarun.cli.commands import list as listing
from hydrarun.config.checks import compatibility
from hydrarun.core import resources
from hydrarun.core.errors import UsageError
from tests.helpers import matrix
from tests.helpers.matrix import Column, Found
from tests.helpers.subjects import CONFIGS, FAMILIES, MODELS


def is_short(name: str, column: Column) -> bool:
    """Whether `make test` runs the cell: for each family one column of each group, in rotation, so that each column is
    run for some family. `make test-all` runs the other cells."""
    group = [one for one in matrix.columns() if one.group == column.group]
    return name in FAMILIES and group.index(column) == FAMILIES.index(name) % len(group)


CELLS = [(name, column) for name in MODELS for column in matrix.columns()]
REFUSED = [cell for cell in CELLS if matrix.refusal(*cell)]
COMBINED = [cell for cell in CELLS if cell not in REFUSED]


@pytest.fixture(scope="module")
def bench(pool, fake) -> matrix.Bench:
    return matrix.Bench(pool, fake)


@pytest.fixture(scope="module")
def check(request) -> Iterator[Callable[[str, Column, Found], None]]:
    """Compare a cell with docs/matrix.md; with `--write-matrix` keep all cells and write the page at the end."""
    if not request.config.getoption("--write-matrix"):
        page = matrix.read_cells()
        yield lambda name, column, found: matrix.compare_cell(page[name, str(column)], found, column.kind)
        return
    cells: dict[tuple[str, Column], Found] = {}
    yield lambda name, column, found: cells.update({(name, column): found})
    matrix.write_tables(matrix.tables(cells))


@pytest.mark.parametrize(
    ("subject", "column"),
    [pytest.param(*cell, marks=() if is_short(*cell) else pytest.mark.full) for cell in COMBINED],
    indirect=["subject"],
    ids=str,
)
def test_a_cell_equals_the_plain_run(subject, column, bench, check):
    found = Found(bench.distance(subject, column), matrix.condition(subject.name, column))
    assert found.distance <= column.kind.most, column.kind.why
    check(subject.name, column, found)


@pytest.mark.parametrize(("name", "column"), REFUSED, ids=str)
def test_a_cell_is_refused_with_the_fix(name, column, check):
    with pytest.raises(UsageError) as refused:
        compatibility.check_compatibility(column.config(name))
    assert " Use " in str(refused.value)
    check(name, column, Found(refusal=matrix.refusal(name, column)))


def test_the_page_has_all_cells():
    assert matrix.read_cells().keys() == {(name, str(column)) for name in MODELS for column in matrix.columns()}


def test_every_acceleration_is_a_column():
    """All groups have columns except `attention`, whose kernels need a GPU; so do all parallel methods."""
    groups = {folder.name for folder in resources.find_folder("conf").iterdir() if (folder / "none.yaml").exists()}
    assert groups - {"plan"} == {*matrix.GROUPS}
    degrees = {key for column in matrix.columns() if column.group == "parallel" for key in degrees_of(column)}
    assert degrees == {f"{name}_degree" for name in listing.METHODS}
    assert {*listing.ACCELERATIONS} - {"attention"} < {*matrix.GROUPS}


def test_what_hydrarun_lists_is_a_cell(accelerations_table):
    """A method that `hydrarun list accelerations` gives a model is run here, under the same condition."""
    assert [row[0] for row in accelerations_table.rows] == MODELS
    rows = {row[0]: dict(zip(accelerations_table.header, row, strict=True)) for row in accelerations_table.rows}
    for column in matrix.columns():
        if column.group == "parallel":
            (method,) = degrees_of(column)
            for name in MODELS:
                listed = rows[name][method.removesuffix("_degree")]
                assert listed == ("-" if (name, column) in REFUSED else matrix.condition(name, column) or "yes"), name


def degrees_of(column: Column) -> set[str]:
    """Return the degrees above 1."""
    degrees = column.config("demo")["parallel"]
    return {key for key, value in degrees.items() if key.endswith("_degree") and value > 1}


def test_a_refusal_is_in_words():
    models = {name: CONFIGS[name]["model"] for name in MODELS}
    bare = next(name for name, model in models.items() if "modulation" not in model["facts"])
    words = matrix.refusal(bare, Column("offload", "modulation"))
    assert words == "The blocks of the model have no modulation weights of their own. Use offload=none."
    unfitted = next(name for name, model in models.items() if model["teacache"] is None)
    assert "hydrarun calibrate" in matrix.refusal(unfitted, Column("cache", "teacache"))


@pytest.mark.parametrize("subject", ["demo"], indirect=True)
def test_what_differs_is_seen(subject, bench):
    """Skipped steps give a distance. Other text or a refusal changes a table's shape, another distance does not."""
    assert bench.distance(subject, Column("cache", "every_n")) > 1e-3
    assert matrix.shape("| a | 3e-7 | 1.2 % | 0 (x > 1) |") == matrix.shape("| a | 0 | 14 % | 1e-08 (x > 1) |")
    assert matrix.shape("| – (1) |") != matrix.shape("| 0 |")


def test_the_tables_are_read_as_they_are_written(tmp_path, monkeypatch):
    page = Path(tmp_path / "matrix.md")
    page.write_text(f"before\n{matrix.MARK}old\n{matrix.END}after\n", encoding="utf-8")
    monkeypatch.setattr(matrix, "PAGE", page)
    matrix.write_tables("| a |")
    assert matrix.read_tables() == "| a |"
    assert page.read_text(encoding="utf-8").endswith(f"{matrix.END}after\n")
