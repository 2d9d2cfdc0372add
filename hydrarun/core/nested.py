"""Nested mappings and lists, as JSON and YAML have them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def iterate_leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the path of each value that is no mapping and no list, and the value: `model.stages[0].area`, 64."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from iterate_leaves(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from iterate_leaves(value, f"{path}[{index}]")
    else:
        yield path, node
