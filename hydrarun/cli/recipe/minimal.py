"""Finds the fewest choices and values that compose to a given configuration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from hydrarun.cli.recipe.evidence import is_local_path
from hydrarun.config.compose import compose_unchecked
from hydrarun.config.options import load_option
from hydrarun.config.schema import Parallel
from hydrarun.core import resources
from hydrarun.outputs.provenance import keep_pixel_settings

#: groups whose option is found from the values in the configuration; `model` is found by name, `cache/predictor` after
#: `cache`
GROUPS = ("scheduler", "parallel", "attention", "compile", "quantization", "offload", "cache")
PREDICTOR = "cache/predictor"
TARGET = "_target_"


class InexpressibleError(Exception):
    """A recipe cannot express the configuration. The message is a sentence with the reason."""


def make_minimal_recipe(wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `defaults` and values of a recipe that composes to `wanted`. Raises InexpressibleError."""
    name = wanted["model"]["name"]
    if not (resources.find_folder("conf") / "model" / f"{name}.yaml").is_file():
        raise InexpressibleError(f"the model '{name}' is not a shipped option, and a recipe cannot add one.")
    chosen = {"model": name, **{group: find_nearest_option(group, wanted, wanted[group]) for group in GROUPS}}
    base = compose_options(chosen)
    predictor = wanted["cache"].get("predictor")
    if predictor and predictor[TARGET] != base["cache"].get("predictor", {}).get(TARGET):
        chosen[PREDICTOR] = find_nearest_option(PREDICTOR, wanted, predictor)
        base = compose_options(chosen)
    usual = resources.read_defaults()
    told = {group: option for group, option in chosen.items() if group == "model" or usual.get(group) != option}
    values: dict[str, Any] = {}
    for path, value in find_differing_values(select_kept_settings(base), select_kept_settings(wanted), ()):
        section = values
        for part in path[:-1]:
            section = section.setdefault(part, {})
        section[path[-1]] = value
    return {"defaults": [{f"override /{group}": option} for group, option in told.items()], **values}


def compose_options(chosen: Mapping[str, str]) -> dict[str, Any]:
    """Compose the configuration of these options alone."""
    return compose_unchecked([f"{group}={option}" for group, option in chosen.items()])[0]


def select_kept_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a recipe keeps: those that change pixels, if only by rounding, and the file format."""
    output = {key: config["output"][key] for key in ("format", "fps")}
    return {**keep_pixel_settings(dict(config)), "output": output, "batch_size": config["batch_size"]}


def find_nearest_option(group: str, wanted: Mapping[str, Any], node: Mapping[str, Any]) -> str:
    """Return the option with the fewest differing values. Raises InexpressibleError if none has the same classes."""
    inner = {"predictor"} if group == "cache" else set()
    own = flatten_values({key: value for key, value in node.items() if key not in inner})
    usual = resources.read_defaults().get(group)
    found: list[tuple[int, bool, str]] = []
    for path in sorted((resources.find_folder("conf") / group).glob("*.yaml")):
        option = load_option(dict(wanted), group, path)
        option = {**asdict(Parallel()), **option} if group == "parallel" else option
        theirs = flatten_values(option)
        if find_classes(theirs) == find_classes(own):
            count = sum(own.get(key) != theirs.get(key) for key in own.keys() | theirs.keys())
            found.append((count, path.stem != usual, path.stem))
    if not found:
        raise InexpressibleError(
            f"its {group} is a {node.get(TARGET)}, which no shipped option uses, and a recipe cannot contain code."
        )
    return min(found)[2]


def find_classes(values: Mapping[tuple[str, ...], Any]) -> dict[tuple[str, ...], Any]:
    """Return only the `_target_` values."""
    return {path: value for path, value in values.items() if path[-1:] == (TARGET,)}


def flatten_values(node: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Return the values of nested mappings by their paths."""
    if not isinstance(node, dict) or not node:
        return {path: node}
    return {key: value for name, child in node.items() for key, value in flatten_values(child, (*path, name)).items()}


def find_differing_values(
    base: Mapping[str, Any], want: Mapping[str, Any], path: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the values of `want` that differ from `base`, by path. Raises InexpressibleError for unsettable values."""
    for key in base.keys() - want.keys():
        raise InexpressibleError(f"{'.'.join((*path, key))} was removed, and a recipe cannot remove keys.")
    for key, value in want.items():
        here = (*path, key)
        if key in base and isinstance(value, dict) and isinstance(base[key], dict):
            yield from find_differing_values(base[key], value, here)
        elif key not in base or base[key] != value:
            check_value(value, here)
            yield here, value


def check_value(value: Any, path: tuple[str, ...]) -> None:
    """Raise InexpressibleError for a class or a local path."""
    for part, leaf in flatten_values(value, path).items():
        if any(name.startswith("_") for name in part):
            raise InexpressibleError(f"{'.'.join(part)} is {leaf}, and a recipe cannot contain code.")
        if isinstance(leaf, str) and path[0] != "sampling" and is_local_path(leaf):
            raise InexpressibleError(f"{'.'.join(part)} is {leaf}, a path on this machine.")
