"""The shape of a row of a batch's ledger. The file may be damaged in ways that JSON does not show."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

#: the fields of each kind of row that are read, with their types
ROWS: dict[str, dict[str, type]] = {
    "begun": {"facts": dict, "timings": dict, "memory": dict},
    "done": {"path": str, "index": int, "pixels_sha256": str},
    "failed": {"indices": list, "error": dict},
    "drawn": {"outputs": list, "timings": dict, "memory": dict, "cache": dict, "inputs": list},
}


def is_ledger_row(row: Mapping[str, Any]) -> bool:
    """Return whether a row has one of the known keys, and what the other functions read from it."""
    if len(row) != 1:
        return False
    ((kind, content),) = row.items()
    if kind == "drawing":
        return _is_indices(content) and bool(content)
    if kind not in ROWS or not isinstance(content, dict):
        return False
    fields = ROWS[kind]
    if not all(isinstance(content.get(name), type_) for name, type_ in fields.items()):
        return False
    if not all(isinstance(content.get(name, {}), dict) for name in ("quality", "noise_floor")):
        return False
    if kind == "done":
        measured = [content.get("quality", {}), *content.get("noise_floor", {}).values()]
        return os.path.basename(content["path"]) == content["path"] and all(map(_are_numbers, measured))
    if kind == "failed":
        return _is_indices(content["indices"]) and isinstance(content["error"].get("message"), str)
    measured = [content["timings"], content["memory"]]
    if kind == "drawn":
        blocks, steps = content["cache"].get("blocks"), {"computed_step_s", "skipped_step_s"}
        if not (isinstance(blocks, dict) and blocks.keys() >= {"run", "all"} and content["cache"].keys() >= steps):
            return False
        if not (_is_indices(content["outputs"]) and all(map(_is_image, content["inputs"]))):
            return False
        measured.append(blocks)
    return all(map(_are_numbers, measured))


def _is_indices(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, int) for one in value)


def _is_image(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("path"), str)


def _are_numbers(values: Any) -> bool:
    """Return whether the values of a mapping are numbers, lists of them, or null."""
    return isinstance(values, dict) and all(
        one is None or _is_number(one) or (isinstance(one, list) and all(map(_is_number, one)))
        for one in values.values()
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))
