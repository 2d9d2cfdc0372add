"""Finds recipes, and provides Hydra's group `recipe`, which contains vetted files only.

`recipe=NAME` is a shipped file in `recipes/`, or a file in the folder `recipes` of a collection in `hydra.searchpath`.
`recipe=PATH.yaml` is a file anywhere.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

from hydrarun.config.recipes.file import Recipe, read_recipe
from hydrarun.core import resources
from hydrarun.core.errors import UsageError, suggest_name
from hydrarun.core.files import expand_home, find_file_problem

SEARCHPATH = "hydra.searchpath"

#: folders of the collections in the last composition's `hydra.searchpath`, in its order
_collections: list[Path] = []


def set_collections(overrides: Sequence[str]) -> None:
    """Use the recipes of the collections that these overrides name in `hydra.searchpath`, and of no others."""
    _collections[:] = []
    for override in overrides:
        if override.lstrip("+").startswith(f"{SEARCHPATH}="):
            try:
                places = OverridesParser.create().parse_override(override).value()
            except HydraException:  # Hydra reports it when it reads the override
                continue
            folders = [str(place).removeprefix("file://") for place in (places if isinstance(places, list) else [])]
            _collections.extend(Path(folder) for folder in folders if "://" not in folder)


def list_roots() -> list[Path]:
    """Return the folders of named recipes, the shipped one first."""
    own = [folder / "recipes" for folder in _collections]
    return [resources.find_folder("recipes"), *(folder for folder in own if folder.is_dir())]


def list_recipe_names() -> list[str]:
    """Return the names of all named recipes: their paths below a root, without `.yaml`."""
    return sorted(
        {path.relative_to(root).with_suffix("").as_posix() for root in list_roots() for path in root.rglob("*.yaml")}
    )


def find_recipe_file(name: str) -> Path:
    """Return the file of `recipe=name`. Raises UsageError if there is none, or more than one."""
    if name.endswith(".yaml"):
        path = expand_home(name)
        if problem := find_file_problem(path):
            raise UsageError(f"recipe={name}: {problem if os.path.lexists(path) else 'there is no such file'}.")
        return path
    known = list_recipe_names()
    if name not in known:
        known.append("none")
        raise UsageError(
            f"recipe={name}: no such recipe.{suggest_name(name, known)} Known: {', '.join(known)}."
            " Your own: the path of a file that ends in .yaml."
        )
    files = [file for root in list_roots() if os.path.lexists(file := root / f"{name}.yaml")]
    if len(files) > 1:
        raise UsageError(f"recipe={name}: in several places: {', '.join(map(str, files))}; give the path of one.")
    return files[0]


def load_recipe(name: str) -> Recipe:
    """Read and vet the recipe with this name or path. Raises UsageError with the name and the reason."""
    return read_recipe(find_recipe_file(name), name)


def load_choices(name: str) -> dict[str, Any]:
    """Return the choices and values that Hydra composes, empty for `none`. Raises UsageError."""
    return {} if name == "none" else load_recipe(name).content


class RecipeSource(ConfigSource):
    """Hydra's group `recipe`. It answers every path below `recipe`, so that Hydra never loads an unvetted file."""

    @staticmethod
    def scheme() -> str:
        return "recipe"

    def available(self) -> bool:
        return True

    def is_group(self, config_path: str) -> bool:
        return config_path in ("", "recipe")

    def is_config(self, config_path: str) -> bool:
        return config_path.startswith("recipe/")

    def load_config(self, config_path: str) -> ConfigResult:
        content = load_choices(config_path.removeprefix("recipe/"))
        return ConfigResult(
            config=OmegaConf.create(content),
            path=config_path,
            provider=self.provider,
            header={"package": "_global_"},
        )

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        if config_path == "" and results_filter is not ObjectType.CONFIG:
            return ["recipe"]
        if config_path == "recipe" and results_filter is not ObjectType.GROUP:
            return [*list_recipe_names(), "none"]
        return []


class RecipeSearchPath(SearchPathPlugin):
    """Puts the recipes before conf/, because Hydra's own file source would follow `recipe=../../anywhere`."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.prepend("hydrarun", "recipe://")


@cache
def register_recipe_source() -> None:
    """Register the group `recipe` with Hydra, once per process."""
    Plugins.instance().register(RecipeSource)
    Plugins.instance().register(RecipeSearchPath)
