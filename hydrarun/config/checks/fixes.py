"""The overrides that a compatibility rule suggests. Each must pass the rule, so some depend on the configuration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from hydrarun.config.checks.questions import (
    Config,
    as_sequence,
    as_whole_number,
    find_cfg_scale,
    get_degree,
    get_gate,
    get_step_count,
    get_teacache_fit,
    get_unguided_scale,
)


class Fix(NamedTuple):
    """Overrides separated by spaces, perhaps with a remark after a comma; or a command after a colon.

    `text` may use the names of `name_values`. `works(config)`: whether the fix helps this configuration.
    """

    text: str
    works: Callable[[Config], bool] = lambda config: True


def name_values(config: Config) -> dict[str, Any]:
    """Return the values of this configuration that a rule's texts may use, by name."""
    gate, steps, off = get_gate(config), get_step_count(config), get_unguided_scale(config)
    ulysses = get_degree(config, "ulysses")
    return {
        "model": config["model"]["name"],
        "steps": steps,
        "off": f"{off:g}",
        "scale": find_cfg_scale(config)[0],
        "on": f"{off + 1:g}",
        "gate_steps": as_whole_number(gate.get("first")) + as_whole_number(gate.get("last")) + 1,
        "list_steps": gate.get("num_inference_steps"),
        "listed": str(list_existing_steps(config)).replace(" ", ""),
        "fitted_steps": find_fitted_steps(config),
        "warmup_steps": as_whole_number(config["cache"].get("max_warmup_steps")) + 1,
        "data": get_degree(config, "data"),
        "ring_as_ulysses": get_degree(config, "ring") * ulysses,
        "tensor_as_ulysses": get_degree(config, "tensor") * ulysses,
    }


def list_existing_steps(config: Config) -> list[int]:
    """Return the steps of the gate's list that a run has."""
    listed = as_sequence(get_gate(config).get("steps"))
    return [step for step in listed if isinstance(step, int) and step < get_step_count(config)]


def find_fitted_steps(config: Config) -> int:
    """Return the number of steps nearest to the run's for which TeaCache's coefficients were fitted."""
    steps = get_step_count(config)
    ends = (get_teacache_fit(config) or {}).get("num_inference_steps")
    return min(max(steps, ends[0]), ends[1]) if ends else steps


def can_skip(config: Config) -> bool:
    """Return whether the run has a step between the first and the last, which most caches always compute."""
    return get_step_count(config) > 2


def can_guide(config: Config) -> bool:
    """Return whether a larger scale alone turns guidance on."""
    model = config["model"]
    prompted = "negative_prompt" not in model["takes"] or model["guidance"].get("unprompted")
    return find_cfg_scale(config)[0] in model["takes"] and bool(
        prompted or config["sampling"]["negative_prompt"] is not None
    )


FIRST_BLOCK, EVERY_N = Fix("cache=first_block", can_skip), Fix("cache=every_n", can_skip)
NO_CACHE = Fix("cache=none", lambda config: not can_skip(config))

#: what else skips steps, by measured changes or by their count
SKIP_BY_CHANGE, SKIP_BY_COUNT = (FIRST_BLOCK, NO_CACHE), (EVERY_N, NO_CACHE)
INSTEAD_OF_CACHE_DIT = (FIRST_BLOCK, EVERY_N)

GUIDE = (Fix("sampling.{scale}={on}", can_guide),)

MORE_PICTURES = (
    Fix("batch_size={data}", lambda config: config["batch_size"] is not None),
    Fix(
        "sampling.num_images_per_prompt={data}",
        lambda config: config["batch_size"] is None and isinstance(config["sampling"]["seed"], int),
    ),
)

CALIBRATE = "hydrarun calibrate model={model}"
