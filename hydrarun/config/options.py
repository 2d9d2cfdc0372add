"""What stands in an option's file, without composing a configuration: fast enough for all of them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf


def load_option(config: dict[str, Any], group: str, file: Path) -> Any:
    """What is in an option's file, with the values that it takes from elsewhere in the configuration."""
    node = read_option(file)
    if "${" not in str(node):  # resolving takes long, for all models and options together
        return node
    whole = OmegaConf.create({"model": config["model"], group: node})
    return OmegaConf.to_container(whole, resolve=True)[group]


@cache
def read_option(file: Path) -> Any:
    """What is in an option's file and in those of its group that it begins with."""
    node = yaml.safe_load(file.read_text(encoding="utf-8"))
    others = [name for name in node.pop("defaults", []) if isinstance(name, str) and name != "_self_"]
    bases = [yaml.safe_load(file.with_stem(name).read_text(encoding="utf-8")) for name in others]
    return OmegaConf.to_container(OmegaConf.merge(*bases, node))
