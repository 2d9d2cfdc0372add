"""Describes in a few lines what a recipe is about to do on this machine."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from hydra.core.override_parser.types import Quote, QuotedString

from hydrarun.config import batches
from hydrarun.config.hub import find_cached_snapshot, find_local_folder
from hydrarun.config.recipes.catalogue import name_machine
from hydrarun.config.recipes.file import Recipe
from hydrarun.core.inputs import image_paths
from hydrarun.core.printable import make_printable
from hydrarun.core.quoting import escape_interpolation
from hydrarun.outputs.media import kinds

MAX_TEXT = 100  # most characters of a value that are shown
MAX_LINE = 300  # most characters of a line


def quote_recipe(name: str) -> str:
    """Return `recipe=name`, quoted for Hydra's grammar if needed."""
    if re.fullmatch(r"[\w./-]+", name):
        return f"recipe={name}"
    return f"recipe={QuotedString(escape_interpolation(name), Quote.double).with_quotes()}"


def describe_recipe(recipe: Recipe, name: str, config: Mapping[str, Any], folder: str) -> Iterator[str]:
    """Return lines, safe to print on a terminal: what is drawn, with which weights, which files are read and written.

    `config` is the configuration that the recipe composes to here, `folder` the output folder.
    """
    lines = [f"recipe {name}" + (f": {' '.join(recipe.about.description.split())}" if recipe.about else "")]
    lines += [f"  by {recipe.about.author}"] if recipe.about and recipe.about.author else []
    lines += [
        f"  model    {config['model']['name']}, {describe_weights(config['model'])}",
        f"  draws    {describe_outputs(config)}",
    ]
    lines += [f"  sets     {one}" for one in format_settings(recipe.content)]
    given = recipe.content.get("input", {}).get("prompts")
    lines += [f"  reads    {path}" for path in (*([given] if given else ()), *list_input_images(config))]
    lines += [f"  writes   {folder}", f"  status   {format_status(recipe)}"]
    return (make_printable(line, MAX_LINE) for line in lines)


def describe_weights(model: Mapping[str, Any]) -> str:
    """Describe the weights, and whether they are local, cached or to be downloaded."""
    path, revision = model["path"], model["revision"]
    if find_local_folder(path, revision) is not None:
        return f"weights {path}"
    at = f" at {revision}" if revision else ""
    if find_cached_snapshot(path, revision):
        return f"weights {path}{at}, in the hub's local cache"
    size = f" (a transformer of {model['facts']['parameters']} parameters)" if "parameters" in model["facts"] else ""
    return f"weights {path}{at}, to be DOWNLOADED from the hub{size}"


def list_input_images(config: Mapping[str, Any]) -> list[str]:
    """Return the input images of all prompts without duplicates."""
    each = (image_paths(one) for _, one in batches.iterate_lines(dict(config)))
    return list(dict.fromkeys(path for paths in each for path in paths))


def describe_outputs(config: Mapping[str, Any]) -> str:
    """Describe the number, size and steps of the outputs."""
    sampling, count = config["sampling"], batches.count_items(config)
    kind = kinds.find_model_kind(config["model"])
    length = kind.length(sampling)
    many = f"{count} {kind.one if count == 1 else kind.many}"
    return f"{many}, {kind.size(sampling)}{f', {length}' if length else ''}, {sampling['num_inference_steps']} steps"


def format_settings(content: Mapping[str, Any]) -> Iterator[str]:
    """Yield the choices and values of the recipe as overrides."""
    for entry in content.get("defaults", []):
        if isinstance(entry, dict):
            yield from (f"{key.removeprefix('override /')}={option}" for key, option in entry.items())
    for section, value in content.items():
        if section != "defaults":
            yield from _format_values(section, value)


def _format_values(path: str, value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, child in value.items():
            yield from _format_values(f"{path}.{key}", child)
        return
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    yield f"{path}={text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + '…'}"


def format_status(recipe: Recipe) -> str:
    """Describe the status, with the date and hardware that the recipe itself states."""
    evidence = recipe.evidence
    if evidence is None:
        return "unverified: it brings no evidence"
    measured = evidence.measured
    words = [recipe.status]
    if evidence.verified and recipe.genuine:
        words.append(
            f"on {evidence.verified.date} with {name_machine(evidence.verified.hardware)}, as the recipe states"
        )
    if measured:
        peak = measured.memory.get("peak_device_bytes") or measured.memory.get("peak_host_bytes", 0)
        words.append(
            f"took {measured.timings.total_s:.3g} s and {peak / 2**30:.3g} GiB on {name_machine(measured.hardware)}"
        )
    return "; ".join(words)
