"""The types of the values in a checkpoint's JSON files that are used before the checkpoint is loaded."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hydrarun.config.type_check import format_value
from hydrarun.core.errors import RunError

#: no size of a checkpoint is larger, and no list of sizes longer
MAX_SIZE = 2**31
MAX_ENTRIES = 64
MAX_CHANNELS = 4096  # of latents

Check = tuple[Callable[[Any], bool], str]


def _is_count(value: Any, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < MAX_SIZE


def _is_size(value: Any) -> bool:
    return _is_count(value, 1)


def _is_list_of_sizes(value: Any) -> bool:
    return isinstance(value, list) and 0 < len(value) <= MAX_ENTRIES and all(map(_is_size, value))


def _is_list_of_flags(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= MAX_ENTRIES and all(isinstance(one, bool) for one in value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_list_of_numbers(value: Any) -> bool:
    return isinstance(value, list) and 0 < len(value) <= MAX_CHANNELS and all(map(_is_number, value))


def _is_class(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(one, str | None) for one in value)


COUNT: Check = (_is_count, "a whole number from 0")
SIZE: Check = (_is_size, "a whole number from 1")
SIZES: Check = (_is_list_of_sizes, "a list of whole numbers from 1")
FLAG: Check = (lambda value: isinstance(value, bool), "true or false")
FLAGS: Check = (_is_list_of_flags, "a list of true and false")
NUMBER: Check = (_is_number, "a finite number")
NUMBERS: Check = (_is_list_of_numbers, "a list of finite numbers")
CLASS: Check = (_is_class, "a list of a library and a class")

#: channels of a head that rotate by each position
ROPE_AXES = ("axes_dims_rope", "axes_dims")

#: the checked keys, by the name of the file. A key may be missing or null
INDEX = {"transformer": CLASS, "transformer_2": CLASS, "scheduler": CLASS, "vae": CLASS}
TRANSFORMER = {
    **dict.fromkeys(("num_layers", "num_single_layers", "n_layers", "n_refiner_layers"), COUNT),
    **dict.fromkeys(("num_attention_heads", "n_heads", "num_key_value_attention_heads", "pos_embed_max_size"), SIZE),
    **dict.fromkeys(ROPE_AXES, SIZES),
    **dict.fromkeys(("attention_head_dim", "dim"), SIZE),
    "guidance_embeds": FLAG,
}
VAE = {
    "temperal_downsample": FLAGS,  # sic
    "block_out_channels": SIZES,
    "downsampling_ratios": SIZES,
    **dict.fromkeys(("scale_factor_temporal", "scale_factor_spatial", "sampling_rate"), SIZE),
    **dict.fromkeys(("z_dim", "latent_channels"), SIZE),
}
#: additional keys of a VAE: how its latents are scaled
LATENTS = {
    **dict.fromkeys(("latents_mean", "latents_std"), NUMBERS),
    **dict.fromkeys(("scaling_factor", "shift_factor"), NUMBER),
}
#: additional key of the transformers of sounds; others store other kinds of values under this name
SOUND = {"sample_size": SIZE}


def check_types(path: Path, content: Mapping[str, Any], checks: Mapping[str, Check]) -> None:
    """Raise `RunError`, which names the file and the key, for a value of another type."""
    for key, (matches, words) in checks.items():
        if content.get(key) is not None and not matches(content[key]):
            raise RunError(f"{path}: {key}: {format_value(content[key])} is not {words}")


def check_rope_axes(path: Path, transformer: Mapping[str, Any]) -> None:
    """Raise `RunError` for more rotated channels than a head has: tables of that size would be built in the run."""
    width = transformer.get("attention_head_dim") or transformer.get("dim")
    for key in ROPE_AXES:
        if width and sum(transformer.get(key) or ()) > width:
            raise RunError(f"{path}: {key}: {transformer[key]} are more channels than the {width} of a head")
