"""Reads option files without composing a configuration, which is fast enough for all options."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf


def load_option(config: dict[str, Any], group: str, file: Path) -> Any:
    """Return the content of an option's file, with its interpolations resolved from `config`."""
    node = read_option(file)
    if "${" not in str(node):  # resolving is slow for all models and options together
        return node
    whole = OmegaConf.create({"model": config["model"], group: node})
    return OmegaConf.to_container(whole, resolve=True)[group]


@cache
def read_option(file: Path) -> Any:
    """Return the content of an option's file, merged with the files of its group in its defaults list."""
    node = yaml.safe_load(file.read_text(encoding="utf-8"))
    others = [name for name in node.pop("defaults", []) if isinstance(name, str) and name != "_self_"]
    bases = [yaml.safe_load(file.with_stem(name).read_text(encoding="utf-8")) for name in others]
    return OmegaConf.to_container(OmegaConf.merge(*bases, node))
