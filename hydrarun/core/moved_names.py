"""Maps dotted class names that older versions wrote into users' files to the current names, and back."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import yaml

from hydrarun.core.resources import PACKAGE

TARGET = "_target_"


@cache
def read_moved_names() -> dict[str, str]:
    """Return `{old dotted name: current name}`. The table is in `models/` because it names models."""
    return yaml.safe_load((PACKAGE / "models" / "moved_names.yaml").read_text(encoding="utf-8"))


def use_current_names(config: Any) -> Any:
    """Return a copy of a configuration in which every moved `_target_` has its current name."""
    return _rename_targets(config, read_moved_names())


def use_original_names(config: Any) -> Any:
    """Return a copy in which every `_target_` has its original name, for values that no version may change."""
    return _rename_targets(config, {new: old for old, new in read_moved_names().items()})


def _rename_targets(node: Any, names: Mapping[str, str]) -> Any:
    if isinstance(node, dict):
        return {
            key: names.get(value, value) if key == TARGET and isinstance(value, str) else _rename_targets(value, names)
            for key, value in node.items()
        }
    return [_rename_targets(value, names) for value in node] if isinstance(node, list) else node
