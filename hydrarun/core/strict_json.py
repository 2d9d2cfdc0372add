"""Parses JSON from files that may come from a stranger: what a parser would accept and later code could not handle."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from hydrarun.core.files import read_file

#: levels of nested lists and objects. The deepest files that this package writes have 10.
MAX_DEPTH = 32

TOO_DEEP = f"nested more than {MAX_DEPTH} levels deep"

#: what diffusers writes into configs, and what Python writes into records of runs
INFINITE = ("Infinity", "-Infinity")
CONSTANTS = (*INFINITE, "NaN")

TOO_LONG = "a number of too many digits"  # more than Python converts

# an escaped half of a surrogate pair; two halves together are a character
HALF = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(data: str | bytes, constants: Collection[str] = ()) -> Any:
    """Parse JSON. `constants`: allowed names of numbers that are not finite, `INFINITE` or `CONSTANTS`.

    Raises `ValueError`, of one line, for invalid JSON or UTF-8, a key that is set twice, too many levels or digits,
    and text that cannot be encoded.
    """
    convert = partial(_parse_constant, constants)
    numbers: dict[str, Any] = {"parse_constant": convert} | ({} if constants else {"parse_float": _parse_finite})
    try:
        text = data if isinstance(data, str) else data.decode()
        content = json.loads(text, object_pairs_hook=_refuse_repeated_keys, **numbers)
    except UnicodeDecodeError:
        raise ValueError("not UTF-8 text") from None
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    except ValueError as error:
        raise ValueError(TOO_LONG if str(error).startswith("Exceeds the limit") else str(error)) from None
    _check_nodes(content, HALF.search(text) is not None)
    return content


def read_json(path: Path, most: int, constants: Collection[str] = ()) -> Any:
    """Read a JSON file of at most `most` bytes.

    Raises `OSError` as `core.files.read_file` does, and `ValueError` as `parse_json` does.
    """
    return parse_json(read_file(path, most), constants)


def read_json_object(path: Path, most: int, constants: Collection[str] = ()) -> dict[str, Any]:
    """Do the same, and raise `ValueError` for anything else than an object."""
    content = read_json(path, most, constants)
    if not isinstance(content, dict):
        raise ValueError("not an object")
    return content


def _check_nodes(content: Any, texts: bool) -> None:
    """Check the depth, level by level, and the `texts` if they may hold halves of surrogate pairs."""
    level: list[Any] = [[content]]
    for _ in range(MAX_DEPTH + 1):
        children = [child for node in level for child in (node.values() if isinstance(node, dict) else node)]
        if texts:
            keys = (key for node in level if isinstance(node, dict) for key in node)
            _check_texts((*keys, *(child for child in children if isinstance(child, str))))
        level = [child for child in children if isinstance(child, (dict, list))]
        if not level:
            return
    raise ValueError(TOO_DEEP)


def _check_texts(texts: Iterable[str]) -> None:
    try:
        for text in texts:
            text.encode()
    except UnicodeEncodeError:
        raise ValueError("holds half of a surrogate pair") from None


def _refuse_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a dict. Raises ValueError for a repeated key, of which the last would win silently."""
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        repeated = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"{repeated[:60]!r} is set twice")
    return found


def _parse_constant(allowed: Collection[str], name: str) -> float:
    if name not in allowed:
        raise ValueError(f"{name} is not a number")
    return float(name)


def _parse_finite(digits: str) -> float:
    value = float(digits)
    if abs(value) == float("inf"):
        raise ValueError(f"{digits[:20]} is too large a number")
    return value
