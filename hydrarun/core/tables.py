"""Tables for terminals, pipes and Markdown."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NamedTuple

from hydrarun.core.printable import make_printable


class Table(NamedTuple):
    """A title, the names of the columns, and the cells, of which each is shown as one printable line."""

    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def print_tables(tables: Sequence[Table]) -> None:
    """Print the tables, formatted for a terminal or plain for pipes and logs."""
    if sys.stdout.isatty():
        _print_rich(tables)
    else:
        print("\n\n".join(map(format_plain, tables)))


def format_markdown(table: Table) -> str:
    """Return the table in Markdown, with a heading."""
    lines = [table.header, tuple("---" for _ in table.header), *_clean_rows(table)]
    body = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
    return "\n".join([f"### {table.title}", "", *body])


def format_plain(table: Table) -> str:
    """Return the table in aligned columns, for pipes and logs."""
    lines = [table.header, *_clean_rows(table)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(table.header))]
    body = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([f"{table.title}:", *(f"  {line}" for line in body)])


def _clean_rows(table: Table) -> list[tuple[str, ...]]:
    return [tuple(map(make_printable, row)) for row in table.rows]


def _print_rich(tables: Sequence[Table]) -> None:
    from rich.console import Console
    from rich.table import Table as RichTable

    console = Console(markup=False, emoji=False)  # brackets in a recipe's description are no markup
    for table in tables:
        shown = RichTable(title=f"\n{table.title}", title_justify="left", title_style="bold", box=None, pad_edge=False)
        for column in table.header:
            shown.add_column(column, overflow="fold")
        for row in _clean_rows(table):
            shown.add_row(*row)
        console.print(shown)
