"""The axes of a sweep, that is the settings that differ between its points, and labels for their values."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hydrarun.outputs.report.collect import Point, get_value

#: keys of `sampling` that set what a run draws; all other settings are about how
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

#: groups whose options are compared by name
GROUPS = ("cache", "attention", "compile", "quantization", "offload", "parallel")

#: sections that affect neither pictures nor speed; of `model`, only name, path and revision are compared
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
    """A setting that differs between points. `values`: in the order of the points; `drawn`: it sets what is drawn."""

    key: str
    values: list[str]
    drawn: bool
    short: str


Values = dict[str, str]  # of one point, by the key of the axis


def find_axes(points: Sequence[Point]) -> tuple[list[Axis], list[Values]]:
    """Find the axes of a sweep, and the values of each point on them.

    Compares the overrides of the command line, or the configurations if any point has no overrides on record.
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
    """Return a short label for a key: from `SHORT`, else its last part if unique in `among`, else the whole key."""
    last = key.rpartition(".")[2]
    alone = sum(other.rpartition(".")[2] == last for other in among) == 1
    return SHORT.get(key, last if alone else key)


def list_settings(points: Sequence[Point]) -> list[Values]:
    """Return the overrides of each point if all have them on record, otherwise their configurations."""
    told = [point.overrides for point in points]
    words = [overrides for overrides in told if overrides is not None]
    if len(words) == len(points):
        return [dict(map(split_override, overrides)) for overrides in words]
    return compare_configs([point.config for point in points])


def split_override(override: str) -> tuple[str, str]:
    """Split an override into key and value, the value without its quotes."""
    key, _, value = override.lstrip("+").partition("=")
    quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    return key, value[1:-1].replace("\\" + value[0], value[0]) if quoted else value


def compare_configs(configs: Sequence[dict[str, Any]]) -> list[Values]:
    """Return the values of each configuration by dotted key; a group whose option differs becomes one value."""
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
    """Yield the values that may become an axis, as text, with their dotted keys."""
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
    """Return the value of a key in the configuration, for points without an override of it."""
    if not config:
        return "unknown"
    if key == "recipe":
        return "none"
    value: Any = config
    for part in ["model", "name"] if key == "model" else re.split("[./]", key):
        value = value.get(part) if isinstance(value, dict) else None
    return name_option(value) if isinstance(value, dict) else format_value(value)


def name_option(node: Any) -> str:
    """Name the option that is chosen in a group: `none`, the class, or the parallel degrees that are not 1."""
    target = get_value(node, "gate", "_target_", kind=str) or get_value(node, "_target_", kind=str)
    if target is not None:
        name = target.rpartition(".")[2]
        return "none" if name.startswith("No") else name
    degrees = {key: value for key, value in node.items() if value not in (1, None)} if isinstance(node, dict) else {}
    return " ".join(f"{key.removesuffix('_degree')} {value}" for key, value in degrees.items()) or "none"


def format_value(value: Any) -> str:
    """Format a value as on the command line."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def is_drawn(key: str) -> bool:
    """Return whether the setting affects what is drawn (a row of the grid), not how (a column)."""
    section, _, name = key.partition(".")
    return section == "input" or (section == "sampling" and name in DRAWN)


def format_label(axes: Sequence[Axis], values: Values) -> str:
    """Format a short label for the values of a point on these axes: `teacache, steps 8`."""
    return ", ".join(format_axis_value(axis, values[axis.key]) for axis in axes)


def format_axis_value(axis: Axis, value: str) -> str:
    """Format one value so that it is clear which setting it belongs to."""
    if "." in axis.key:
        return f"{axis.short} {value}"
    if value == "none":
        return f"no {axis.short}"
    plain = value.replace(".", "").isdigit() or value in ("auto", "true", "false", "unknown", "default")
    return f"{axis.short} {value}" if plain else value
