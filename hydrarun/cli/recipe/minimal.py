"""The fewest choices and values that compose to a given configuration."""

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

#: groups whose option is found by what the configuration has; `model` goes by its name, `cache/predictor` comes after
GROUPS = ("scheduler", "parallel", "attention", "compile", "quantization", "offload", "cache")
PREDICTOR = "cache/predictor"
TARGET = "_target_"


class InexpressibleError(Exception):
    """Why a recipe cannot say it, in a sentence."""


def make_minimal_recipe(wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The `defaults` and values of a recipe that composes to `wanted`. Raises Inexpressible."""
    name = wanted["model"]["name"]
    if not (resources.find_folder("conf") / "model" / f"{name}.yaml").is_file():
        raise InexpressibleError(f"the model '{name}' is none of the shipped options, and a recipe brings none along.")
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
    """The configuration of these options alone."""
    return compose_unchecked([f"{group}={option}" for group, option in chosen.items()])[0]


def select_kept_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a recipe repeats: what reaches the pixels, if only to rounding, and how files are written."""
    output = {key: config["output"][key] for key in ("format", "fps")}
    return {**keep_pixel_settings(dict(config)), "output": output, "batch_size": config["batch_size"]}


def find_nearest_option(group: str, wanted: Mapping[str, Any], node: Mapping[str, Any]) -> str:
    """The option from which the fewest values differ. Raises Inexpressible if all are of another class."""
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
            f"its {group} is a {node.get(TARGET)}, which is no shipped option's, and a recipe brings no code."
        )
    return min(found)[2]


def find_classes(values: Mapping[tuple[str, ...], Any]) -> dict[tuple[str, ...], Any]:
    """The `_target_`s among them."""
    return {path: value for path, value in values.items() if path[-1:] == (TARGET,)}


def flatten_values(node: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """The values of nested mappings by their paths."""
    if not isinstance(node, dict) or not node:
        return {path: node}
    return {key: value for name, child in node.items() for key, value in flatten_values(child, (*path, name)).items()}


def find_differing_values(
    base: Mapping[str, Any], want: Mapping[str, Any], path: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The values of `want` that `base` has not, by their paths. Raises Inexpressible for what no recipe may set."""
    for key in base.keys() - want.keys():
        raise InexpressibleError(f"{'.'.join((*path, key))} was taken out, which no recipe can.")
    for key, value in want.items():
        here = (*path, key)
        if key in base and isinstance(value, dict) and isinstance(base[key], dict):
            yield from find_differing_values(base[key], value, here)
        elif key not in base or base[key] != value:
            check_value(value, here)
            yield here, value


def check_value(value: Any, path: tuple[str, ...]) -> None:
    """Raises Inexpressible for a class, or a place on this machine."""
    for part, leaf in flatten_values(value, path).items():
        if any(name.startswith("_") for name in part):
            raise InexpressibleError(f"{'.'.join(part)} is {leaf}, and a recipe brings no code.")
        if isinstance(leaf, str) and path[0] != "sampling" and is_local_path(leaf):
            raise InexpressibleError(f"{'.'.join(part)} is {leaf}, a place on this machine.")
