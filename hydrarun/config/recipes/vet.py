"""Vets the content of recipes: choices of options and plain values only. A recipe is data, never code.

Not allowed: keys of the form `_key_`, the section `hydra` (Hydra runs callbacks and writes files before the program
starts), interpolations and resolvers, folders that the run writes to, and the limit on the number of ranks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from hydrarun.config.targets import FORBIDDEN_ARGUMENTS
from hydrarun.core.errors import suggest_name
from hydrarun.core.quoting import TEXT_KEYS, escape_interpolation
from hydrarun.core.resources import list_groups

NAME = re.compile(r"[\w-]+(/[\w-]+)*")
KEY = re.compile(r"[A-Za-z][A-Za-z0-9_]*")

#: keys that no recipe may set, and what they set
COMMAND_LINE_ONLY = {
    "report.twins": "where files are written",
    "compile.cache_dir": "where files are written",
    "parallel.max_ranks": "how many ranks may be started",
}

#: keys whose values are literal text: prompts, and paths after they are made absolute
LITERAL = (*TEXT_KEYS, "input.images", "input.prompts", "model.path")


def find_problems(text: str, content: Mapping[str, Any]) -> Iterator[str]:
    """Yield a sentence for each forbidden item in a recipe. `content` excludes the metadata."""
    for line in text.splitlines():
        if re.match(r"\s*#\s*@", line) and not re.fullmatch(r"\s*#\s*@package\s+_global_\s*", line):
            yield f"the header '{line.strip()}' is not allowed; a recipe needs none."
    yield from _check_defaults(content.get("defaults", []))
    for key, value in content.items():
        if key != "defaults":
            yield from _check_value({key: value}, "")


def escape_texts(node: Any, path: str = "") -> Any:
    """Return the content with `${` escaped in prompts and paths, so that OmegaConf does not interpolate it."""
    if isinstance(node, dict):
        return {key: escape_texts(value, f"{path}.{key}" if path else key) for key, value in node.items()}
    if isinstance(node, list):
        return [escape_texts(value, path) for value in node]
    return escape_interpolation(node) if isinstance(node, str) and path in LITERAL else node


def _check_defaults(defaults: Any) -> Iterator[str]:
    example = "write `defaults: [override /model: demo]`"
    if not isinstance(defaults, list):
        yield f"defaults is not a list: {example}."
        return
    for entry in defaults:
        key, option = next(iter(entry.items())) if isinstance(entry, dict) and len(entry) == 1 else (None, None)
        group = re.fullmatch(r"override /([\w/]+)", str(key))
        if entry == "_self_":
            continue
        if not group:
            yield f"defaults: {entry!r} is not allowed; {example}."
        elif group[1] not in list_groups():
            hint = suggest_name(group[1], list_groups())
            yield f"defaults: a recipe may not choose '{group[1]}'.{hint} Groups: {', '.join(list_groups())}."
        elif not isinstance(option, str) or not NAME.fullmatch(option):
            yield f"defaults: {option!r} is not the name of an option of '{group[1]}'."


def _check_value(node: Any, path: str) -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            here = f"{path}.{key}" if path else str(key)
            if not isinstance(key, str) or not KEY.fullmatch(key) or here == "hydra":
                yield f"'{here}' is not allowed: a recipe chooses options and sets values, it cannot bring code."
            elif here in COMMAND_LINE_ONLY:
                yield f"'{here}' is not allowed: only the command line sets {COMMAND_LINE_ONLY[here]}."
            elif key in FORBIDDEN_ARGUMENTS:
                yield f"'{here}' is not allowed: it would run code that comes with a checkpoint."
            else:
                yield from _check_value(value, here)
    elif isinstance(node, list):
        for value in node:
            yield from _check_value(value, path)
    elif isinstance(node, str):
        if "${" in node and path not in TEXT_KEYS:
            yield f"{path}: {node!r}: interpolations and resolvers are not allowed, write the value."
        if not node.isprintable() and path not in TEXT_KEYS:
            yield f"{path}: {node!a} holds control characters."
    elif not isinstance(node, (int, float, type(None))):
        yield f"{path}: a {type(node).__name__} is not a plain value."
