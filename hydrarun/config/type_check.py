"""Checks plain YAML values against type annotations: dataclass fields and the arguments of `_target_` nodes."""

from __future__ import annotations

import types
import typing
from typing import Any

LONGEST = 200  # most characters of a value in a message


def matches_hint(value: Any, hint: Any) -> bool:
    """Return whether `value` matches `hint`; True for annotations that YAML cannot express. A bool is not a number."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(matches_hint(value, option) for option in typing.get_args(hint))
    if origin is typing.Literal:
        return value in typing.get_args(hint)
    if origin is list:
        return isinstance(value, list) and all(matches_hint(item, typing.get_args(hint)[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(matches_hint(item, typing.get_args(hint)[1]) for item in value.values())
    if hint in (None, type(None)):
        return value is None
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (bool, str):
        return isinstance(value, hint)
    return True


def describe_hint(hint: Any) -> str:
    """Describe an annotation for a user: "true or false", "a whole number or null", "one of a, b"."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe_hint(option) for option in typing.get_args(hint))
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    if origin in (list, dict):
        return f"a {'list' if origin is list else 'mapping'} of {describe_hint(typing.get_args(hint)[-1])}"
    words = {
        Any: "anything",
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        type(None): "null",
    }
    return words.get(hint, str(hint))


def format_value(value: Any) -> str:
    """Format a value for a message as in YAML or on the command line: true, null, 'text'. Long ones are cut."""
    if isinstance(value, (bool, type(None))):
        return {True: "true", False: "false", None: "null"}[value]
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"
