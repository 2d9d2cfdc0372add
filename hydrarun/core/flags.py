"""Reads the flags of a command line."""

from __future__ import annotations

from collections.abc import Sequence


def flag_value(flags: Sequence[str], *names: str) -> str | None:
    """Return the value of the flag with one of these names, as `--name value` or `--name=value`, or None."""
    for place, flag in enumerate(flags):
        name, equals, value = flag.partition("=")
        if name in names:
            return value if equals else flags[place + 1]
    return None
