"""`hydrarun report DIR`: a page about a sweep that was run before."""

from __future__ import annotations

from pathlib import Path

from hydrarun.cli.arguments import Arguments
from hydrarun.core.errors import UsageError
from hydrarun.core.flags import flag_value
from hydrarun.outputs import report

USAGE = """\
usage: hydrarun report DIR [--reference NAME]

Writes DIR/report.html, one file that needs no other, and DIR/report.json about the runs in and below DIR: the pictures
side by side, how far each is from the reference, times, memory, quality, and the command that repeats each point.
NAME is the setting, as the report words it, or a point of it, that the others are compared to: by default the first
without cache and quantization."""


def write_report(line: Arguments) -> int:
    """Write the report on the line's folder; the exit code. Raises UsageError and RunError."""
    if len(line.words) != 1:
        raise UsageError(f"report takes one folder, not {' '.join(line.words) or 'none'}\n{USAGE}")
    print(report.write_report(Path(line.words[0]), flag_value(line.flags, "--reference")))
    return 0
