"""Questions about a configuration that the compatibility rules, and others, ask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hydrarun.config.batches import count_pictures
from hydrarun.config.checks.values import find_cfg_scale, get_unguided_scale
from hydrarun.outputs.media import kinds

Config = Mapping[str, Any]

#: offloads that move weights to the device and off it, as names for `uses_offload`
MOVING = ("Expert", "Model", "Layerwise", "Disk", "TextEncoder")


def uses_option(config: Config, group: str, name: str) -> bool:
    """Return whether the option of `group` is the class `name`."""
    return str(config[group].get("_target_", "")).rpartition(".")[2] == name


def find_quantized(config: Config) -> Sequence[str]:
    """Return the components whose weights are quantized."""
    return config["quantization"].get("components") or ()


def uses_float8_activations(config: Config) -> bool:
    """Return whether activations are float8 too."""
    return config["quantization"].get("activations") == "float8"


def uses_offload(config: Config, *whats: str) -> bool:
    """Return whether the offload option is the class `{what}Offload` for one of `whats`."""
    return any(uses_option(config, "offload", f"{what}Offload") for what in whats)


def uses_cuda_graphs(config: Config) -> bool:
    """Return whether compiled blocks run as CUDA graphs."""
    return config["compile"].get("mode") in ("reduce-overhead", "max-autotune")


def get_degree(config: Config, name: str) -> int:
    """Return the number of ranks of a parallel method."""
    return config["parallel"][f"{name}_degree"]


def uses_guidance(config: Config) -> bool:
    """Return whether guidance is on, so that a step predicts two branches."""
    name, scale = find_cfg_scale(config)
    return name in config["model"]["takes"] and scale is not None and scale > get_unguided_scale(config)


def draws_sounds(config: Config) -> bool:
    """Return whether the model draws sounds."""
    return kinds.find_model_kind(config["model"]) is kinds.SOUND


def find_skipped_layers(config: Config) -> Sequence[int]:
    """Return the blocks that skip-layer guidance leaves out in its third prediction; empty with guidance off."""
    return as_sequence(config["model"]["guidance"].get("layers")) if uses_guidance(config) else ()


def count_batch_pictures(config: Config) -> int:
    """Return the number of pictures in a batch."""
    return config["batch_size"] or count_pictures(config["sampling"])


def encodes_prompts_singly(config: Config) -> bool:
    """Return whether the text encoder runs once per prompt, so that ranks may run it different numbers of times."""
    stages = (str(stage.get("_target_", "")) for stage in config["model"]["stages"])
    return any(stage.endswith((".EncodePromptWithImages", ".EncodePromptAndDrawPrior")) for stage in stages)


def get_gate(config: Config) -> Config:
    """Return the node of the cache's gate, empty if there is none."""
    return config["cache"].get("gate") or {}


def uses_gate(config: Config, name: str) -> bool:
    """Return whether the cache's gate is the class `name`."""
    return str(get_gate(config).get("_target_", "")).rpartition(".")[2] == name


def get_teacache_fit(config: Config) -> Config | None:
    """Return TeaCache's coefficients and the conditions of their fit; None without TeaCache or without a fit."""
    return get_gate(config).get("fit") if uses_gate(config, "TeaCache") else None


def get_step_count(config: Config) -> int:
    """Return the number of steps in the schedule."""
    return config["sampling"]["num_inference_steps"]


def as_whole_number(value: Any) -> int:
    """Return an int unchanged, and 0 for anything else: the class that takes the value refuses other types."""
    return value if isinstance(value, int) else 0


def as_sequence(value: Any) -> Sequence[Any]:
    """Return a list unchanged, and an empty sequence for anything else."""
    return value if isinstance(value, list) else ()


def is_in_range(value: int, ends: Sequence[int] | None) -> bool:
    """Return whether a value lies within `[least, most]`; True if `ends` is None."""
    return ends is None or ends[0] <= value <= ends[1]


def uses_step_density(config: Config) -> bool:
    """Return whether a density of SCM chooses the computed steps."""
    return (get_gate(config).get("density") or config["cache"].get("steps_computation_mask")) is not None
