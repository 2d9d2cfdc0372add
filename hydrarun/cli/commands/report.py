"""`hydrarun report DIR`: writes the report of a finished sweep."""

from __future__ import annotations

from pathlib import Path

from hydrarun.cli.arguments import Arguments
from hydrarun.core.errors import UsageError
from hydrarun.core.flags import flag_value
from hydrarun.outputs import report

USAGE = """\
usage: hydrarun report DIR [--reference NAME]

Writes DIR/report.html, a self-contained page, and DIR/report.json about the runs in and below DIR: the pictures side by
side, their distance from the reference, times, memory, quality, and the command that repeats each point.
NAME is the reference: a setting as labelled in the report, or one of its points. The default is the first setting
without cache and quantization."""


def write_report(line: Arguments) -> int:
    """Write the report of a folder; return the exit code. Raises UsageError and RunError."""
    if len(line.words) != 1:
        raise UsageError(f"report takes one folder, not {' '.join(line.words) or 'none'}", *USAGE.splitlines())
    print(report.write_report(Path(line.words[0]), flag_value(line.flags, "--reference")))
    return 0
