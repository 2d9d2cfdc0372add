"""The bounds of counts and numbers. What lies beyond them is a mistake, refused before any work.

They are far above what models and machines take. The limits of a model (`model.limits`) and of a checkpoint are checked
elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from hydrarun.core.nested import iterate_leaves

#: pictures of one run: all prompts, or all lines of `input.prompts`, times `num_images_per_prompt`
MAX_PICTURES = 100_000
#: pictures of one batch
MAX_BATCH = 1_024
#: points of one sweep
MAX_POINTS = 2_000
MAX_SEED = 2**63 - 1
#: the largest N of device=cuda:N; torch keeps it in 8 bits
MAX_DEVICE_INDEX = 127
#: bits of any whole number of a configuration, whatever its key
MAX_BITS = 64

#: least and most of each number, by section ("" for the top level); the least of a field that takes fractions is 0.0
BOUNDS: dict[str, dict[str, tuple[float, float]]] = {
    "": {"batch_size": (1, MAX_BATCH), "retry": (0, 1_000)},
    "sampling": {
        "num_inference_steps": (1, 100_000),
        "height": (1, 16_384),
        "width": (1, 16_384),
        "resolution": (1, 16_384),
        "num_frames": (1, 10_000),
        "layers": (1, 1_000),
        "max_sequence_length": (1, 100_000),
        "num_images_per_prompt": (1, MAX_PICTURES),
        "true_cfg_scale": (0.0, 1_000),
        "guidance_scale": (0.0, 1_000),
        "guidance_scale_2": (0.0, 1_000),
        "audio_start_in_s": (0.0, 86_400),
        "audio_end_in_s": (0.0, 86_400),
    },
    "output": {"fps": (1, 1_000)},
    "model": {"patch_size": (1, 256), "experts": (1, 2)},
    "scheduler": {"num_train_timesteps": (1, 1_000_000)},
}

#: most blocks of one kind in a checkpoint's component
MAX_BLOCKS = 10_000

Problem = tuple[str, str]  # key, sentence


def find_bound_problems(
    config: Mapping[str, Any], section: str, names: Iterable[str] | None = None
) -> Iterator[Problem]:
    """Yield the numbers of a section that are out of bounds: those of these `names`, by default all."""
    node, bounds = config[section] if section else config, BOUNDS[section]
    for name in bounds if names is None else names:
        if text := describe_excess(node.get(name), *bounds[name]):
            yield f"{section}.{name}".lstrip("."), text


def describe_excess(value: Any, least: float, most: float) -> str | None:
    """Return the sentence about a number out of bounds; None for one within, and for what is no number."""
    if not isinstance(value, (int, float)) or least <= value <= most:
        return None
    if isinstance(least, float) and not least <= value < math.inf:
        return f"{value} is not a finite number >= {least:g}."
    return f"{value} is below {least}." if value < least else f"{value} is above {most}."


def find_wide_numbers(config: Any) -> Iterator[Problem]:
    """Yield the whole numbers of more than `MAX_BITS` bits, which neither torch nor a float holds."""
    for path, value in iterate_leaves(config):
        if isinstance(value, int) and value.bit_length() > MAX_BITS:
            yield path, f"a whole number of {value.bit_length()} bits; {MAX_BITS} at most."
