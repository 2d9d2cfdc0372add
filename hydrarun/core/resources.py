"""Finds the folders shipped with the package: next to it in a checkout, inside it in a wheel."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import yaml

from hydrarun.core.errors import RunError

PACKAGE = Path(__file__).resolve().parents[1]


def find_folder(name: str) -> Path:
    """Return the absolute path of `conf`, `recipes` or `weights`. Raises RunError if the installation lacks it."""
    # Inside first: in site-packages, folders next to the package belong to other packages.
    for place in (PACKAGE / name, PACKAGE.parent / name):
        if place.is_dir():
            return place
    raise RunError(f"hydrarun: the folder '{name}' is missing next to {PACKAGE}: the installation is incomplete.")


def read_options(group: str) -> dict[str, Any]:
    """Return the shipped options of a group by name, as plain data: ranks do not import Hydra."""
    files = sorted((find_folder("conf") / group).glob("*.yaml"))
    return {file.stem: yaml.safe_load(file.read_text(encoding="utf-8")) for file in files}


@cache
def read_defaults() -> dict[str, str]:
    """Return the default option of each group."""
    listed = yaml.safe_load((find_folder("conf") / "config.yaml").read_text(encoding="utf-8"))["defaults"]
    return {group: option for entry in listed if isinstance(entry, dict) for group, option in entry.items()}


def list_groups() -> list[str]:
    """Return the groups whose options a recipe may choose; `cache/predictor` is a group inside another."""
    root = find_folder("conf")
    folders = (path.relative_to(root) for path in root.rglob("*") if path.is_dir())
    return sorted(path.as_posix() for path in folders if path.parts[0] != "hydra")
