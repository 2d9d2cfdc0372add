"""The two errors a user may see without a traceback, and the nearest name to a mistyped one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UsageError(Exception):
    """The user's mistake. The message is the whole line (or lines) to print; the command exits with 2."""


class RunError(Exception):
    """A run failed for a reason the user can act on (corrupt weights, NaN pictures…). Printed as is; exit code 1."""


def nearest(name: str, names: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the most similar of `names`, or "" if none is similar (0.6 of difflib's ratio)."""
    close = difflib.get_close_matches(name, sorted(names), n=1)
    return f" Did you mean '{close[0]}'?" if close else ""
