"""Classes move, files of users don't: dotted names that older versions wrote, and those of today."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import yaml

from hydrarun.core.resources import PACKAGE

TARGET = "_target_"


@cache
def read_moved_names() -> dict[str, str]:
    """`{old dotted name: today's}`. The table stands in `models/`, since it names models."""
    return yaml.safe_load((PACKAGE / "models" / "moved_names.yaml").read_text(encoding="utf-8"))


def use_current_names(config: Any) -> Any:
    """A copy of a configuration in which every `_target_` that has moved has its name of today."""
    return _rename_targets(config, read_moved_names())


def use_original_names(config: Any) -> Any:
    """A copy in which every `_target_` has the first name it ever had, for what must stay the same over versions."""
    return _rename_targets(config, {new: old for old, new in read_moved_names().items()})


def _rename_targets(node: Any, names: Mapping[str, str]) -> Any:
    if isinstance(node, dict):
        return {
            key: names.get(value, value) if key == TARGET and isinstance(value, str) else _rename_targets(value, names)
            for key, value in node.items()
        }
    return [_rename_targets(value, names) for value in node] if isinstance(node, list) else node
