"""Reading flags of a command line."""

from __future__ import annotations

from collections.abc import Sequence


def flag_value(flags: Sequence[str], *names: str) -> str | None:
    """The value of the flag that has one of these names, as `--name value` or `--name=value`; None without it."""
    for place, flag in enumerate(flags):
        name, equals, value = flag.partition("=")
        if name in names:
            return value if equals else flags[place + 1]
    return None
