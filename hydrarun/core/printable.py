"""Text that is safe on a terminal: what comes from files of others could rewrite the screen, or invent lines.

Control characters and those that change the direction of writing are shown as `?`.
"""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

#: Unicode's categories of control characters, formats (bidi overrides among them), halves of pairs and line breaks
HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
#: formats that scripts and emoji need: the non-joiner and the joiner
JOINERS = "\u200c\u200d"


def make_printable(text: str, most: int | None = None) -> str:
    """Return `text` as one line of at most `most` characters. White space that breaks or shifts it becomes a space."""
    return _replace_hidden(text[:most], "")


def make_printable_lines(text: str) -> str:
    """Return `text` with its line feeds and tabs."""
    return _replace_hidden(text, "\n\t")


def _replace_hidden(text: str, kept: str) -> str:
    if text.isprintable():
        return text
    return "".join(character if character in kept else _show_character(character) for character in text)


def _show_character(character: str) -> str:
    if character.isprintable() or character in JOINERS or unicodedata.category(character) not in HIDDEN:
        return character
    return " " if character.isspace() else "?"


class PrintableStream:
    """A text stream that writes only printable text to another one."""

    def __init__(self, stream: TextIO) -> None:
        #: rich, whose own control characters are wanted, finds the stream here
        self.rich_proxied_file = stream

    def write(self, text: str) -> int:
        """Write the printable lines of `text`."""
        self.rich_proxied_file.write(make_printable_lines(text))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        """Write each of `lines`."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rich_proxied_file, name)


def find_raw_stream(stream: Any) -> Any:
    """Return the stream below those that filter or redirect it."""
    while (inner := getattr(stream, "rich_proxied_file", None)) is not None:
        stream = inner
    return stream


@contextmanager
def printable_output() -> Iterator[None]:
    """Make stdout and stderr printable while the block runs. Every process that shows text to the user does this."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (  # type: ignore[assignment]
        stream if isinstance(stream, PrintableStream) else PrintableStream(stream) for stream in before
    )
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
