"""Tables show every cell as one literal, printable line."""

from __future__ import annotations

import io
import sys

import pytest

from hydrarun.core.tables import Table, format_markdown, format_plain, print_tables

TABLE = Table("t", ("a", "b"), [("[bold]x[/] :cat:", "y\x1b[2J\u202e\nz")])
CELLS = ("[bold]x[/] :cat:", "y?[2J? z")


@pytest.mark.parametrize(("format_table", "lines"), [(format_plain, 3), (format_markdown, 5)])
def test_a_row_is_a_line(format_table, lines):
    text = format_table(TABLE)
    assert len(text.splitlines()) == lines
    assert all(cell in text.splitlines()[-1] for cell in CELLS)


def test_on_a_terminal_too(monkeypatch):
    text = io.StringIO()
    text.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", text)
    monkeypatch.setenv("COLUMNS", "100")
    print_tables([TABLE])
    assert all(cell in text.getvalue().splitlines()[-1] for cell in CELLS)
