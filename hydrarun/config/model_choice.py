"""Finds which model option runs a checkpoint, from its JSON files alone."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from hydrarun.config.checks.checkpoint import DEPTHS, HEADS, read_json
from hydrarun.config.hub import PACKAGE as SHIPPED
from hydrarun.config.hub import find_named_folder, read_hub_json
from hydrarun.core.errors import RunError, UsageError
from hydrarun.core.printable import make_printable
from hydrarun.core.resources import PACKAGE, read_options

#: published configs of checkpoints, one file each
SHAPES = PACKAGE / "models" / "shapes"

#: sizes of a transformer's config.json that tell variants of a family apart
SIZES = (*DEPTHS, *HEADS, "attention_head_dim", "dim", "in_channels", "joint_attention_dim", "ffn_dim")


#: the files that tell what a checkpoint is
IDENTITY = ("model_index.json", "transformer/config.json")


class ModelTraits(NamedTuple):
    """What tells a model option's checkpoints from others."""

    #: the pipeline class that saves them
    saved_by: str
    experts: int
    #: model_index.json and transformer/config.json of the published checkpoint, as far as known
    pipeline: Mapping[str, Any]
    transformer: Mapping[str, Any]


def load_shapes(name: str) -> dict[str, dict[str, Any]]:
    """Load `{component: config}` and the `model_index`. Values override those of the shapes that `like` names."""
    content = yaml.safe_load((SHAPES / f"{name}.yaml").read_text(encoding="utf-8"))
    like = content.pop("like", None)
    base = load_shapes(like) if like else {}
    return base | {key: base.get(key, {}) | value for key, value in content.items()}


@cache
def read_model_traits() -> dict[str, ModelTraits]:
    """Return the traits of each shipped model option, in their order."""
    options = read_options("model")
    return {name: _describe_option(_inherit_model(name, options)) for name in options}


def _inherit_model(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the section `model` of an option, with what it inherits from another one."""
    node = options[name]
    parent = next((one for one in node.get("defaults", ()) if one in options), None)
    base = _inherit_model(parent, options) if parent else {}
    own = node["model"]
    return {**base, **own, "facts": {**base.get("facts", {}), **own.get("facts", {})}}


def _describe_option(model: Mapping[str, Any]) -> ModelTraits:
    index: Mapping[str, Any] = {}
    transformer: Mapping[str, Any] = {}
    if shapes := model["facts"].get("shapes"):
        known = load_shapes(shapes)
        index, transformer = known["model_index"], known["transformer"]
    elif model["path"].startswith(SHIPPED) and (folder := find_named_folder(model["path"])):
        index, transformer = read_json(folder / "model_index.json"), read_json(folder / "transformer" / "config.json")
    saved_by = model["pipeline"]["_target_"].rpartition(".")[2]
    return ModelTraits(saved_by, model.get("experts", 1), index, transformer)


def find_model_options(index: Mapping[str, Any], transformer: Mapping[str, Any]) -> list[str]:
    """Return the options that run a checkpoint with these configs, the nearest first; empty: none does.

    By pipeline class; then number of experts, `expand_timesteps` and `guidance_embeds`; then sizes; then their order.
    """
    found = {name: one for name, one in read_model_traits().items() if index.get("_class_name") == one.saved_by}
    entry = index.get("transformer_2")
    second = isinstance(entry, list) and bool(entry) and entry[0] is not None
    tests = (
        lambda one: (one.experts > 1) == (second or index.get("boundary_ratio") is not None),
        lambda one: bool(one.pipeline.get("expand_timesteps")) == bool(index.get("expand_timesteps")),
        lambda one: bool(one.transformer.get("guidance_embeds")) == bool(transformer.get("guidance_embeds")),
    )
    for fits in tests:
        found = {name: one for name, one in found.items() if fits(one)} or found
    return sorted(found, key=lambda name: measure_distance(found[name].transformer, transformer))


def measure_distance(known: Mapping[str, Any], config: Mapping[str, Any]) -> float:
    """Return how far the sizes of two transformers are apart: the sum of the logarithms of their ratios."""
    logarithms = [(_log_size(known.get(key)), _log_size(config.get(key))) for key in SIZES]
    apart = [abs(one - other) for one, other in logarithms if one is not None and other is not None]
    return sum(apart) if apart else math.inf


def _log_size(value: Any) -> float | None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf
    return math.log(value) if number else None


def read_checkpoint_identity(path: str, revision: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return model_index.json and transformer/config.json of a folder or a hub id. Raises UsageError."""
    folder = find_named_folder(path)
    index, transformer = (
        read_hub_json(path, revision, name) if folder is None else read_json(folder / name) for name in IDENTITY
    )
    return index, transformer


def choose_model(overrides: Sequence[str]) -> list[str]:
    """Add `model=NAME` to quoted overrides that name a checkpoint and no model, and say so once.

    A recipe names its model, and several checkpoints of a sweep need theirs named. Raises UsageError for a checkpoint
    that no option runs.
    """
    given = dict(_iterate_values(overrides))
    if "model" in given or given.get("recipe", "none") != "none" or not isinstance(given.get("model.path"), str):
        return [*overrides]
    revision = given.get("model.revision")
    name = _choose_option(given["model.path"], revision if isinstance(revision, str) else None)
    return [*overrides, f"model={name}"] if name else [*overrides]


@cache
def _choose_option(path: str, revision: str | None) -> str | None:
    try:
        index, transformer = read_checkpoint_identity(path, revision)
    except RunError as error:  # of the hub
        raise UsageError(f"{error} Or name its model, model=…") from None
    if "_class_name" not in index:
        return None  # a damaged file, which is reported where it is loaded
    options = find_model_options(index, transformer)
    if not options:
        raise UsageError(f"model.path={path}: {describe_mismatch(index, transformer)}")
    others = f"; model={', '.join(options[1:])} would fit too" if len(options) > 1 else ""
    note = f"model={options[0]}: chosen for {path}, a checkpoint of {index['_class_name']}{others}"
    print(make_printable(note), file=sys.stderr)
    return options[0]


def describe_mismatch(index: Mapping[str, Any], transformer: Mapping[str, Any]) -> str:
    """Return the end of a message about a checkpoint of another model: what it is, and the option for it."""
    options = find_model_options(index, transformer)
    what = f"a checkpoint of {str(index.get('_class_name'))[:100]}"
    return f"{what}: use model={options[0]}" if options else f"{what}, which no model runs: `hydrarun list` shows them"


def _iterate_values(overrides: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Yield the key and the value of each override that Hydra can parse; a sweep's value is not a text."""
    parser = OverridesParser.create()
    for word in overrides:
        try:
            parsed = parser.parse_override(word)
        except HydraException:
            continue
        yield parsed.key_or_group, None if parsed.is_sweep_override() else parsed.value()


def find_class_problem(model: Mapping[str, Any], folder: Path) -> str | None:
    """Return why a model option does not run the checkpoint in `folder`; None if it does, or if nobody can tell."""
    index, transformer = (read_json(folder / name) for name in IDENTITY)
    wanted = str(model["pipeline"].get("_target_", "")).rpartition(".")[2]
    if not isinstance(index.get("_class_name"), str) or index["_class_name"] == wanted:
        return None
    return f"model={model['name']} does not run {describe_mismatch(index, transformer)}"
