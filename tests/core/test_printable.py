"""What a terminal never gets, whoever wrote it; and what stays as it is."""

from __future__ import annotations

import io
import sys

import pytest
from rich.console import Console
from rich.progress import Progress as Bars

from hydrarun.core.printable import (
    PrintableStream,
    find_raw_stream,
    make_printable,
    make_printable_lines,
    printable_output,
)

HARMFUL = {
    "erases the screen": "\x1b[2J",
    "sets the title": "\x1b]0;x\x07",
    "one-byte CSI": "\x9b2J",
    "delete": "\x7f",
    "backspace": "\b",
    "null": "\0",
    "right-to-left override": "\u202e",
    "isolate": "\u2066",
    "mark": "\u200f",
    "Arabic mark": "\u061c",
    "byte order mark": "\ufeff",
    "tag": "\U000e0041",
    "half of a pair": "\udc80",
}
MOVES = ["\r", "\v", "\f", "\x85", "\u2028", "\u2029", "\x1c"]
HARMLESS = "a [bold]b[/] :cat: 一只猫 ｃ\u3000d\u00a0e é e\u0301 👩\u200d🚀 می\u200cخواهم \ue0b0"


@pytest.mark.parametrize("text", HARMFUL.values(), ids=HARMFUL)
def test_what_controls_a_terminal_is_shown_as_a_question_mark(text):
    assert make_printable(f"a{text}b") == make_printable_lines(f"a{text}b")
    shown = make_printable(f"a{text}b")
    assert shown.startswith("a?")
    assert shown.endswith("b")
    assert shown.isprintable()
    assert shown.encode()


@pytest.mark.parametrize("text", MOVES)
def test_what_moves_the_cursor_is_a_space(text):
    assert make_printable(f"a{text}b") == make_printable_lines(f"a{text}b") == "a b"


def test_line_feeds_and_tabs_are_kept_in_lines_only():
    assert make_printable("a\n\tb") == "a  b"
    assert make_printable_lines("a\n\tb\r\n") == "a\n\tb \n"


def test_text_of_any_script_stays_as_it_is():
    assert make_printable(HARMLESS) == HARMLESS
    assert make_printable(HARMLESS, 3) == HARMLESS[:3]


def test_output_is_filtered_while_the_block_runs(monkeypatch):
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    with printable_output(), printable_output():  # a second one changes nothing
        print("a\x1b[2J\nb")
        sys.stderr.writelines(["c\u202e\n", "d\udc80\n"])
        assert find_raw_stream(sys.stdout) is out
    assert (out.getvalue(), err.getvalue()) == ("a?[2J\nb\n", "c?\nd?\n")
    assert (sys.stdout, sys.stderr) == (out, err)


def test_what_rich_itself_writes_passes(monkeypatch):
    """And what others print meanwhile, which rich takes over, does not."""
    err = io.StringIO()
    console = Console(file=PrintableStream(err), force_terminal=True)
    monkeypatch.setattr(sys, "stderr", err)
    with Bars(console=console, transient=True), printable_output():
        assert find_raw_stream(sys.stderr) is err
        print("a\x1b[31mb\x9b2J", file=sys.stderr)
    assert "\x1b[2K" in err.getvalue()
    assert "a?[31mb?2J" in err.getvalue()
