"""Which recipes there are, and Hydra's group `recipe`, in which only vetted files stand.

`recipe=NAME` is a shipped file of `recipes/`, or one of the folder `recipes` of a collection in `hydra.searchpath`;
`recipe=PATH.yaml` is a file anywhere.
"""

from __future__ import annotations

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

SEARCHPATH = "hydra.searchpath"

#: folders of collections, in the order of `hydra.searchpath`: what the last composition was told
_collections: list[Path] = []


def set_collections(overrides: Sequence[str]) -> None:
    """Take the recipes of the collections that these overrides name in `hydra.searchpath`, and of no others."""
    _collections[:] = []
    for override in overrides:
        if override.lstrip("+").startswith(f"{SEARCHPATH}="):
            try:
                places = OverridesParser.create().parse_override(override).value()
            except HydraException:  # Hydra says so when it reads it
                continue
            folders = [str(place).removeprefix("file://") for place in (places if isinstance(places, list) else [])]
            _collections.extend(Path(folder) for folder in folders if "://" not in folder)


def list_roots() -> list[Path]:
    """The folders that hold recipes by name; the shipped one first."""
    own = [folder / "recipes" for folder in _collections]
    return [resources.find_folder("recipes"), *(folder for folder in own if folder.is_dir())]


def list_recipe_names() -> list[str]:
    """The recipes that have a name: their paths below a root, without `.yaml`."""
    return sorted(
        {path.relative_to(root).with_suffix("").as_posix() for root in list_roots() for path in root.rglob("*.yaml")}
    )


def find_recipe_file(name: str) -> Path:
    """The file that `recipe=name` means. Raises UsageError if there is none, or more than one."""
    if name.endswith(".yaml"):
        path = Path(name).expanduser()
        if not path.is_file():
            raise UsageError(f"recipe={name}: there is no such file.")
        return path
    known = list_recipe_names()
    if name not in known:
        known.append("none")
        raise UsageError(
            f"recipe={name}: no such recipe.{suggest_name(name, known)} Known: {', '.join(known)}."
            " Your own: the path of a file that ends in .yaml."
        )
    files = [file for root in list_roots() if (file := root / f"{name}.yaml").is_file()]
    if len(files) > 1:
        raise UsageError(f"recipe={name}: in several places: {', '.join(map(str, files))}; give the path of one.")
    return files[0]


def load_recipe(name: str) -> Recipe:
    """The vetted recipe of that name or path. Raises UsageError that names it and says what it may not do."""
    return read_recipe(find_recipe_file(name), name)


def load_choices(name: str) -> dict[str, Any]:
    """Its choices and values as Hydra composes them; `none` has none. Raises UsageError."""
    return {} if name == "none" else load_recipe(name).content


class RecipeSource(ConfigSource):
    """Hydra's group `recipe`: every path below it is answered here, so that no unvetted file can stand in."""

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
    """Puts the recipes before conf/: Hydra's own file source would follow `recipe=../../anywhere`."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.prepend("hydrarun", "recipe://")


@cache
def register_recipe_source() -> None:
    """Make `recipe=` known to Hydra, once per process."""
    Plugins.instance().register(RecipeSource)
    Plugins.instance().register(RecipeSearchPath)
