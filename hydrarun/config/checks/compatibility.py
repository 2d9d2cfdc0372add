"""Compatibility of settings: a table of rules over a configuration, checked before weights are read.

Each rule has a group or key, a condition under which it is broken, a sentence, and the override that fixes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from hydrarun.config.batches import count_pictures, iterate_lines
from hydrarun.config.checks.report import REPEAT
from hydrarun.config.checks.values import find_cfg_scale, get_unguided_scale
from hydrarun.core.errors import raise_mistakes
from hydrarun.outputs.media import kinds

Config = Mapping[str, Any]


#: offloads that move weights to the device and off it, as names for `uses_offload`
MOVING = ("Expert", "Model", "Layerwise", "Disk", "TextEncoder")


class CompatibilityRule(NamedTuple):
    """One rule, broken if `broken(config)` is true. `sentence` and `fix` may use `{model}`, `{steps}` and `{off}`."""

    group: str
    broken: Callable[[Config], bool]
    sentence: str
    fix: str


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


RULES = (
    CompatibilityRule(
        "cache.gate.fit",
        lambda config: uses_gate(config, "TeaCache") and get_teacache_fit(config) is None,
        "TeaCache has no coefficients for model {model}",
        "cache=first_block, or make them: hydrarun calibrate model={model} cache=teacache input.prompts=prompts.txt",
    ),
    CompatibilityRule(
        "cache.gate.fit",
        lambda config: (
            (get_teacache_fit(config) or {"model": config["model"]["name"]})["model"] != config["model"]["name"]
        ),
        "the coefficients were fitted on another model than {model}",
        "cache=first_block, or make them: hydrarun calibrate model={model} cache=teacache input.prompts=prompts.txt",
    ),
    CompatibilityRule(
        "cache.gate.fit",
        lambda config: (
            not is_in_range(get_step_count(config), (get_teacache_fit(config) or {}).get("num_inference_steps"))
        ),
        "the coefficients were fitted on other numbers of steps than {steps}",
        "cache=first_block, or make them for that number: hydrarun calibrate model={model} cache=teacache"
        " sampling.num_inference_steps={steps} input.prompts=prompts.txt",
    ),
    CompatibilityRule(
        "cache.gate",
        lambda config: (
            as_whole_number(get_gate(config).get("first")) + as_whole_number(get_gate(config).get("last"))
            >= get_step_count(config)
        ),
        "the first and last steps are always computed and cover all {steps}: there is none to skip",
        "cache.gate.first=1, or more sampling.num_inference_steps",
    ),
    CompatibilityRule(
        "cache.gate.steps",
        # a Heun scheduler has up to twice as many steps
        lambda config: any(
            as_whole_number(step) >= 2 * get_step_count(config) - 1
            for step in as_sequence(get_gate(config).get("steps"))
        ),
        "a step is listed that a run of {steps} does not have",
        "cache=none, or a list of steps below {steps}",
    ),
    CompatibilityRule(
        "cache.gate.steps",
        lambda config: (
            (get_gate(config).get("num_inference_steps") or get_step_count(config)) != get_step_count(config)
        ),
        "the list of computed steps is for another sampling.num_inference_steps than {steps}",
        "cache=every_n, or a list for {steps}: hydrarun calibrate model={model} cache=mask"
        " sampling.num_inference_steps={steps} input.prompts=prompts.txt",
    ),
    CompatibilityRule(
        "cache",
        lambda config: uses_step_density(config) and get_step_count(config) < 8,
        "the densities are made for 8 steps and more, not {steps}",
        "cache=every_n, or a list cache.gate.steps=[0,1,3] with cache=mask cache.gate.density=null",
    ),
    CompatibilityRule(
        "cache.max_warmup_steps",
        lambda config: as_whole_number(config["cache"].get("max_warmup_steps")) >= get_step_count(config),
        "the warm-up alone takes all {steps} steps: there is none to skip",
        "cache.max_warmup_steps=1, or more sampling.num_inference_steps",
    ),
    CompatibilityRule(
        "cache",
        lambda config: (
            uses_option(config, "cache", "CacheDiT")
            and get_degree(config, "hsdp") > 1
            and get_degree(config, "cfg") > 1
        ),
        "cache-dit decides for each branch by itself: ranks of different branches would not all join HSDP's gathers of"
        " weights",
        "parallel.cfg_degree=1, or one of cache=teacache, first_block, mask, every_n",
    ),
    CompatibilityRule(
        "model.guidance.layers",
        lambda config: (
            bool(find_skipped_layers(config)) and get_degree(config, "hsdp") > 1 and get_degree(config, "cfg") > 1
        ),
        "ranks that predict the negative prompt run one forward less, and would miss HSDP's gathers of weights",
        "parallel.cfg_degree=1, or model.guidance.layers=null",
    ),
    CompatibilityRule(
        "parallel.cfg_degree",
        lambda config: get_degree(config, "cfg") > 1 and not uses_guidance(config),
        "with guidance off, or only as an input of the model, there is one branch to predict",
        "parallel.cfg_degree=1, or a scale above {off}",
    ),
    CompatibilityRule(
        "parallel.cfg_degree",
        lambda config: get_degree(config, "cfg") > 2,
        "guidance has two branches, the prompt's and the negative prompt's",
        "parallel.cfg_degree=2",
    ),
    CompatibilityRule(
        "parallel.data_degree",
        lambda config: get_degree(config, "data") > count_batch_pictures(config),
        "there are fewer pictures than ranks to draw them",
        "parallel.data_degree=1, or more prompts, seeds or sampling.num_images_per_prompt; or a larger batch_size",
    ),
    CompatibilityRule(
        "parallel.hsdp_degree",
        lambda config: (
            get_degree(config, "hsdp") > 1 and get_degree(config, "data") > 1 and encodes_prompts_singly(config)
        ),
        "model {model} encodes one prompt at a time: ranks with fewer prompts would miss HSDP's gathers of weights",
        "parallel.data_degree=1",
    ),
    CompatibilityRule(
        "parallel.ring_degree",
        lambda config: get_degree(config, "ring") > 1 and not uses_option(config, "attention", "SDPA"),
        "ring attention needs the log-sum-exp of the scores, which this attention kernel does not return here",
        "attention=sdpa, or parallel.ulysses_degree instead",
    ),
    CompatibilityRule(
        "report.noise_floor",
        lambda config: get_degree(config, "ring") > 1 and bool({*config["report"]["noise_floor"]} - {REPEAT}),
        "ring attention needs the log-sum-exp of the scores, which the other attention kernels do not return here",
        "report.noise_floor=[repeat], or parallel.ulysses_degree instead",
    ),
    CompatibilityRule(
        "parallel.vae_degree",
        lambda config: get_degree(config, "vae") > 1 and draws_sounds(config),
        "ranks share the rows of a picture, and a sound has none",
        "parallel.vae_degree=1, or vae.tiling=true with it, which decodes with less memory",
    ),
    CompatibilityRule(
        "vae.channels_last",
        lambda config: config["vae"]["channels_last"] and draws_sounds(config),
        "it is a layout of pictures, and model {model} draws sounds",
        "vae.channels_last=false",
    ),
    CompatibilityRule(
        "parallel.vae_degree",
        lambda config: get_degree(config, "vae") > 1 and config["vae"]["tiling"],
        "each rank decodes its rows of the picture, which replaces tiles",
        "vae.tiling=false",
    ),
    CompatibilityRule(
        "compile",
        lambda config: (
            uses_option(config, "compile", "CompileFull")
            and any(get_degree(config, name) > 1 for name in ("ring", "ulysses", "tensor", "hsdp"))
        ),
        "ranks communicate between the layers, and compile=full makes the transformer one graph",
        "compile=blocks, or parallel.cfg_degree or parallel.data_degree instead",
    ),
    CompatibilityRule(
        "compile",
        lambda config: uses_option(config, "compile", "CompileFull") and uses_option(config, "cache", "CacheDiT"),
        "cache-dit runs the transformer block by block, and compile=full makes it one graph",
        "compile=blocks, or one of cache=teacache, first_block, mask, every_n",
    ),
    CompatibilityRule(
        "quantization",
        lambda config: "transformer" in find_quantized(config) and get_degree(config, "tensor") > 1,
        "each rank's shard of a row would have a scale of its own, and the picture would depend on the number of ranks",
        "quantization=none, or parallel.tensor_degree=1 and parallel.ulysses_degree instead",
    ),
    CompatibilityRule(
        "quantization",
        lambda config: bool(find_quantized(config)) and get_degree(config, "hsdp") > 1,
        "HSDP cannot shard quantized weights",
        "quantization=none, or parallel.hsdp_degree=1",
    ),
    CompatibilityRule(
        "quantization",
        lambda config: config["quantization"].get("weights") == "int8" and config["dtype"] == "float16",
        "products with int8 weights exceed float16's range before they are scaled",
        "quantization=none, or dtype=bfloat16",
    ),
    CompatibilityRule(
        "quantization",
        lambda config: uses_float8_activations(config) and config["dtype"] not in ("auto", "bfloat16"),
        "products of float8 weights and activations, with a scale for each row, have dtype bfloat16",
        "quantization=none, or dtype=bfloat16",
    ),
    CompatibilityRule(
        "quantization",
        lambda config: uses_float8_activations(config) and config["device"] == "cpu",
        "float8 numbers are multiplied by GPUs only",
        "quantization=none, or quantization=fp8_weight_only",
    ),
    CompatibilityRule(
        "offload",
        lambda config: uses_offload(config, *MOVING) and get_degree(config, "hsdp") > 1,
        "HSDP keeps each rank's shard of the weights on its device",
        "offload=none",
    ),
    CompatibilityRule(
        "offload",
        lambda config: uses_offload(config, "Expert") and config["model"]["experts"] < 2,
        "model {model} has one transformer: there is no expert to swap",
        "offload=none",
    ),
    CompatibilityRule(
        "offload",
        lambda config: uses_offload(config, "Expert", "Model", "Layerwise") and config["device"] == "cpu",
        "on device=cpu the host is the device: there is nothing to offload to",
        "offload=none",
    ),
    CompatibilityRule(
        "offload",
        lambda config: uses_offload(config, "Disk") and "transformer" in find_quantized(config),
        "the blocks are read from their files in every step, and would be quantized again each time",
        "quantization=none, or offload=layerwise, which keeps them quantized on the host",
    ),
    CompatibilityRule(
        "compile",
        lambda config: uses_offload(config, "Layerwise", "Disk") and uses_option(config, "compile", "CompileFull"),
        "in one graph no block can wait until its weights are loaded",
        "compile=blocks",
    ),
    CompatibilityRule(
        "compile.mode",
        lambda config: uses_offload(config, "Layerwise", "Disk") and uses_cuda_graphs(config),
        "a CUDA graph reads weights at the addresses it was recorded with, and the blocks' weights move",
        "compile.mode=default",
    ),
    CompatibilityRule(
        "offload",
        lambda config: (
            uses_option(config, "offload", "ModulationOffload") and "modulation" not in config["model"]["facts"]
        ),
        "the blocks of model {model} have no modulation weights of their own",
        "offload=none",
    ),
)


def find_violations(config: Config) -> Iterator[CompatibilityRule]:
    """Yield the broken rules."""
    return (rule for rule in RULES if rule.broken(config))


def format_violations(config: Config) -> list[str]:
    """Return one line for each broken rule."""
    names = {
        "model": config["model"]["name"],
        "steps": get_step_count(config),
        "off": f"{get_unguided_scale(config):g}",
    }
    return [f"{rule.group}: {rule.sentence}. Use {rule.fix}.".format(**names) for rule in find_violations(config)]


def check_compatibility(config: Config) -> None:
    """Raise `UsageError` with one line for each rule that any line of `input.prompts` breaks."""
    raise_mistakes(text for _, one in iterate_lines(dict(config)) for text in format_violations(one))
