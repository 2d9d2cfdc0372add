"""What differs between the points of a sweep: its axes, and the words for their values."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hydrarun.outputs.report.collect import Point, get_value

#: what a run draws; everything else is how it draws
DRAWN = (
    "prompt",
    "negative_prompt",
    "seed",
    "num_images_per_prompt",
    "height",
    "width",
    "num_frames",
    "audio_start_in_s",
    "audio_end_in_s",
    "layers",
    "resolution",
)

#: choices that are told apart by their names
GROUPS = ("cache", "attention", "compile", "quantization", "offload", "parallel")

#: what says nothing about the pictures or their speed; of `model` only its name, path and revision do
BESIDE = ("model", "report", "output", "plan", "verify")

SHORT = {
    "sampling.num_inference_steps": "steps",
    "sampling.true_cfg_scale": "CFG",
    "sampling.guidance_scale": "guidance",
    "sampling.num_images_per_prompt": "images",
    "sampling.num_frames": "frames",
    "sampling.audio_start_in_s": "from second",
    "sampling.audio_end_in_s": "to second",
    "sampling.layers": "layers",
    "sampling.resolution": "resolution",
}


@dataclass(frozen=True)
class Axis:
    """A setting that differs between points. `values`: in the order of the points; `drawn`: it says what is drawn."""

    key: str
    values: list[str]
    drawn: bool
    short: str


Values = dict[str, str]  # of one point, by the key of the axis


def find_axes(points: Sequence[Point]) -> tuple[list[Axis], list[Values]]:
    """The axes of a sweep, and each point's values on them.

    They are overrides of the command line; where a point has none on record, what differs in the configurations.
    """
    settings = list_settings(points)
    keys = list(dict.fromkeys(key for chosen in settings for key in chosen))
    rows: list[Values] = []
    for point, chosen in zip(points, settings, strict=True):
        rows.append({key: chosen[key] if key in chosen else find_config_value(point.config, key) for key in keys})
    found = {key: list(dict.fromkeys(row[key] for row in rows)) for key in keys}
    swept = [key for key in keys if len(found[key]) > 1]
    axes = [Axis(key, found[key], is_drawn(key), shorten_key(key, swept)) for key in swept]
    return axes, [{key: row[key] for key in swept} for row in rows]


def shorten_key(key: str, among: Sequence[str]) -> str:
    """A word for a key: its last part, where no other of them ends so."""
    last = key.rpartition(".")[2]
    alone = sum(other.rpartition(".")[2] == last for other in among) == 1
    return SHORT.get(key, last if alone else key)


def list_settings(points: Sequence[Point]) -> list[Values]:
    """What each point was told, or else its configuration."""
    told = [point.overrides for point in points]
    words = [overrides for overrides in told if overrides is not None]
    if len(words) == len(points):
        return [dict(map(split_override, overrides)) for overrides in words]
    return compare_configs([point.config for point in points])


def split_override(override: str) -> tuple[str, str]:
    """Key and value of an override, the value without the quotes around it."""
    key, _, value = override.lstrip("+").partition("=")
    quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    return key, value[1:-1].replace("\\" + value[0], value[0]) if quoted else value


def compare_configs(configs: Sequence[dict[str, Any]]) -> list[Values]:
    """The values of each configuration, by dotted key; a group in which the points chose differently is one value."""
    flat = [dict(flatten_config(config)) for config in configs]
    for group in GROUPS:
        names = [name_option(config.get(group)) for config in configs]
        if len(set(names)) == 1:
            continue
        for values, name in zip(flat, names, strict=True):
            for key in [key for key in values if key.startswith(f"{group}.")]:
                del values[key]
            values[group] = name
    return flat


def flatten_config(config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The values that may be an axis, as text, by their dotted keys."""
    for key in ("name", "path", "revision"):
        yield f"model.{key}", format_value((get_value(config, "model", kind=dict) or {}).get(key))
    for section, content in config.items():
        if section not in BESIDE:
            yield from _flatten_section(section, content)


def _flatten_section(key: str, content: Any) -> Iterator[tuple[str, str]]:
    if isinstance(content, dict):
        for name, value in content.items():
            yield from _flatten_section(f"{key}.{name}", value)
    else:
        yield key, format_value(content)


def find_config_value(config: dict[str, Any], key: str) -> str:
    """The value that a configuration has where the command line said nothing."""
    if not config:
        return "unknown"
    if key == "recipe":
        return "none"
    value: Any = config
    for part in ["model", "name"] if key == "model" else re.split("[./]", key):
        value = value.get(part) if isinstance(value, dict) else None
    return name_option(value) if isinstance(value, dict) else format_value(value)


def name_option(node: Any) -> str:
    """A word for what was chosen in a group: `none`, the class, or the degrees that are not 1."""
    target = get_value(node, "gate", "_target_", kind=str) or get_value(node, "_target_", kind=str)
    if target is not None:
        name = target.rpartition(".")[2]
        return "none" if name.startswith("No") else name
    degrees = node.items() if isinstance(node, dict) else ()
    return " ".join(f"{key.removesuffix('_degree')} {value}" for key, value in degrees if value != 1) or "none"


def format_value(value: Any) -> str:
    """A value as it is written on a command line."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def is_drawn(key: str) -> bool:
    """Whether the setting says what is drawn (a row of the grid), not how (a column)."""
    section, _, name = key.partition(".")
    return section == "input" or (section == "sampling" and name in DRAWN)


def format_label(axes: Sequence[Axis], values: Values) -> str:
    """A short name for a point's values on these axes: `teacache, steps 8`."""
    return ", ".join(format_axis_value(axis, values[axis.key]) for axis in axes)


def format_axis_value(axis: Axis, value: str) -> str:
    """One value so that it says which setting it is of."""
    if "." in axis.key:
        return f"{axis.short} {value}"
    if value == "none":
        return f"no {axis.short}"
    plain = value.replace(".", "").isdigit() or value in ("auto", "true", "false", "unknown", "default")
    return f"{axis.short} {value}" if plain else value
