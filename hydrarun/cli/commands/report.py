"""`hydrarun report DIR`: a page about a sweep that was run before."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hydrarun.core.errors import UsageError
from hydrarun.outputs import report

USAGE = """\
usage: hydrarun report DIR [--reference NAME]

Writes DIR/report.html, one file that needs no other, and DIR/report.json about the runs in and below DIR: the pictures
side by side, how far each is from the reference, times, memory, quality, and the command that repeats each point.
NAME is the setting, as the report words it, or a point of it, that the others are compared to: by default the first
without cache and quantization."""

REFERENCE = "--reference"


def main(argv: Sequence[str]) -> int:
    """Write the report that `argv` asks for; the exit code. Raises UsageError and RunError."""
    if {"-h", "--help"} & set(argv):
        print(USAGE)
        return 0
    print(report.write(*parse(argv)))
    return 0


def parse(argv: Sequence[str]) -> tuple[Path, str | None]:
    """The folder, and the reference if one is named."""
    words, folders = list(argv), []
    reference = None
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        if name == REFERENCE:
            if not (equals or words):
                raise UsageError(f"report: {REFERENCE}: needs a value")
            reference = value if equals else words.pop(0)
        elif word.startswith("-"):
            raise UsageError(f"report: {word}: no such flag; it takes {REFERENCE} NAME")
        else:
            folders.append(Path(word))
    if len(folders) != 1:
        raise UsageError(f"report takes one folder, not {' '.join(map(str, folders)) or 'none'}\n{USAGE}")
    return folders[0], reference
