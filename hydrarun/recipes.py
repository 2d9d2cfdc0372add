"""Recipes: small YAML files that strangers share. Read and vetted here, before Hydra composes anything.

A recipe chooses options (`defaults: [override /model: demo]`) and sets values. It is data, never code: no `_key_`s, no
`hydra` section (Hydra runs callbacks and writes files before the program starts), no interpolations or resolvers, no
YAML tags or aliases. `recipe=NAME` is a shipped file of `recipes/`, `recipe=PATH.yaml` a file anywhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

from hydrarun import resources
from hydrarun.errors import UsageError, nearest
from hydrarun.targets import FORBIDDEN_ARGUMENTS
from hydrarun.text import TEXT_KEYS, escape_interpolation

MAX_BYTES = 64 * 1024
NAME = re.compile(r"[\w-]+(/[\w-]+)*")
KEY = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


def names() -> list[str]:
    """The shipped recipes, without `.yaml`."""
    root = resources.folder("recipes")
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml"))


def groups() -> list[str]:
    """The groups whose options a recipe may choose; `cache/predictor` is one inside another."""
    root = resources.folder("conf")
    folders = (path.relative_to(root) for path in root.rglob("*") if path.is_dir())
    return sorted(path.as_posix() for path in folders if path.parts[0] != "hydra")


def file_of(name: str) -> Path:
    """The file that `recipe=name` means. Raises UsageError if there is none."""
    if name.endswith(".yaml"):
        path = Path(name).expanduser()
        if not path.is_file():
            raise UsageError(f"recipe={name}: there is no such file.")
        return path
    if name not in names():
        known = [*names(), "none"]
        raise UsageError(
            f"recipe={name}: no such recipe.{nearest(name, known)} Shipped: {', '.join(known)}."
            " Your own: the path of a file that ends in .yaml."
        )
    return resources.folder("recipes") / f"{name}.yaml"


def load(name: str) -> dict[str, Any]:
    """The vetted content of a recipe; `none` is empty. Raises UsageError that names the file and what it may not do."""
    if name == "none":
        return {}
    path = file_of(name)
    where = f"recipe {name}"
    if path.stat().st_size > MAX_BYTES:
        raise UsageError(f"{where}: larger than {MAX_BYTES // 1024} KiB, which no recipe is.")
    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.load(text, _Loader) if text else {}
    except UnicodeDecodeError:
        raise UsageError(f"{where}: not UTF-8 text.") from None
    except RecursionError:
        raise UsageError(f"{where}: nested too deeply.") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{where}: {_yaml_problem(error)}") from None
    if content is None:
        content = {}
    for problem in _problems(text, content):
        raise UsageError(f"{where}: {problem}")
    return {key: _literal_texts(value, key) for key, value in content.items()}


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
        content = load(config_path.removeprefix("recipe/"))
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
            return [*names(), "none"]
        return []


class RecipeSearchPath(SearchPathPlugin):
    """Puts the recipes before conf/: Hydra's own file source would follow `recipe=../../anywhere`."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.prepend("hydrarun", "recipe://")


@cache
def register() -> None:
    """Make `recipe=` known to Hydra, once per process."""
    Plugins.instance().register(RecipeSource)
    Plugins.instance().register(RecipeSearchPath)


class _Loader(yaml.SafeLoader):
    """Plain YAML: no aliases (a few of them unfold to gigabytes), no repeated keys (the last would win silently)."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem="a recipe may not use aliases", problem_mark=mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"'{key.value}' is set twice", problem_mark=key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


# A date or `1e-3` must come out as what it looks like in the rest of the configuration: text and a float.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _yaml_problem(error: yaml.YAMLError) -> str:
    """One line from a YAML error: what is wrong, in which line."""
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    return f"line {mark.line + 1}: {problem}" if mark else problem


def _problems(text: str, content: Any) -> Iterator[str]:
    for line in text.splitlines():
        if re.match(r"\s*#\s*@", line) and not re.fullmatch(r"\s*#\s*@package\s+_global_\s*", line):
            yield f"the header '{line.strip()}' is not allowed; a recipe needs none."
    if not isinstance(content, dict):
        yield "not a mapping of sections, such as `sampling: {num_inference_steps: 8}`."
        return
    yield from _defaults_problems(content.get("defaults", []))
    for key, value in content.items():
        if key != "defaults":
            yield from _value_problems({key: value}, "")


def _defaults_problems(defaults: Any) -> Iterator[str]:
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
        elif group[1] not in groups():
            hint = nearest(group[1], groups())
            yield f"defaults: a recipe may not choose '{group[1]}'.{hint} Groups: {', '.join(groups())}."
        elif not isinstance(option, str) or not NAME.fullmatch(option):
            yield f"defaults: {option!r} is not the name of an option of '{group[1]}'."


def _value_problems(node: Any, path: str) -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            here = f"{path}.{key}" if path else str(key)
            if not isinstance(key, str) or not KEY.fullmatch(key) or here == "hydra":
                yield f"'{here}' is not allowed: a recipe chooses options and sets values, it cannot bring code."
            elif here in ("report.twins", "compile.cache_dir"):
                yield f"'{here}' is not allowed: where files are written is for the command line to say."
            elif key in FORBIDDEN_ARGUMENTS:
                yield f"'{here}' is not allowed: it would run code that comes with a checkpoint."
            else:
                yield from _value_problems(value, here)
    elif isinstance(node, list):
        for value in node:
            yield from _value_problems(value, path)
    elif isinstance(node, str):
        if "${" in node and path not in TEXT_KEYS:
            yield f"{path}: {node!r}: interpolations and resolvers are not allowed, write the value."
    elif not isinstance(node, (int, float, type(None))):
        yield f"{path}: a {type(node).__name__} is not a plain value."


def _literal_texts(node: Any, path: str) -> Any:
    """The content with `${` in prompts made literal."""
    if isinstance(node, dict):
        return {key: _literal_texts(value, f"{path}.{key}") for key, value in node.items()}
    if isinstance(node, list):
        return [_literal_texts(value, path) for value in node]
    return escape_interpolation(node) if isinstance(node, str) and path in TEXT_KEYS else node
