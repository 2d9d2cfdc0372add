"""Compatibility of settings: a table of rules over a configuration, checked before weights are read.

Each rule has a group or key, a condition under which it is broken, a sentence, and the overrides that fix it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from hydrarun.config.batches import iterate_lines
from hydrarun.config.checks.fixes import (
    CALIBRATE,
    GUIDE,
    INSTEAD_OF_CACHE_DIT,
    MORE_PICTURES,
    SKIP_BY_CHANGE,
    SKIP_BY_COUNT,
    Fix,
    can_skip,
    list_existing_steps,
    name_values,
)
from hydrarun.config.checks.questions import (
    MOVING,
    Config,
    as_sequence,
    as_whole_number,
    count_batch_pictures,
    draws_sounds,
    encodes_prompts_singly,
    find_quantized,
    find_skipped_layers,
    get_degree,
    get_gate,
    get_step_count,
    get_teacache_fit,
    is_in_range,
    uses_cuda_graphs,
    uses_float8_activations,
    uses_gate,
    uses_guidance,
    uses_offload,
    uses_option,
    uses_step_density,
)
from hydrarun.config.checks.report import REPEAT
from hydrarun.core.errors import raise_mistakes


class CompatibilityRule(NamedTuple):
    """One rule, broken if `broken(config)` is true. The sentence may use the names of `fixes.name_values`."""

    group: str
    broken: Callable[[Config], bool]
    sentence: str
    fixes: tuple[Fix, ...]

    def list_fixes(self, config: Config) -> list[str]:
        """Return the fixes that work for `config`."""
        names = name_values(config)
        return [fix.text.format(**names) for fix in self.fixes if fix.works(config)]

    def format(self, config: Config) -> str:
        """Return the line about a configuration that breaks the rule."""
        sentence = self.sentence.format(**name_values(config))
        return f"{self.group}: {sentence}. Use {', or '.join(self.list_fixes(config))}."


RULES = (
    CompatibilityRule(
        "cache.gate.fit",
        lambda config: uses_gate(config, "TeaCache") and get_teacache_fit(config) is None,
        "TeaCache has no coefficients for model {model}",
        (*SKIP_BY_CHANGE, Fix(f"make them: {CALIBRATE} cache=teacache input.prompts=prompts.txt")),
    ),
    CompatibilityRule(
        "cache.gate.fit",
        lambda config: (
            (get_teacache_fit(config) or {"model": config["model"]["name"]})["model"] != config["model"]["name"]
        ),
        "the coefficients were fitted on another model than {model}",
        (*SKIP_BY_CHANGE, Fix(f"make them: {CALIBRATE} cache=teacache input.prompts=prompts.txt")),
    ),
    CompatibilityRule(
        "cache.gate.fit",
        lambda config: (
            not is_in_range(get_step_count(config), (get_teacache_fit(config) or {}).get("num_inference_steps"))
        ),
        "the coefficients were fitted on other numbers of steps than {steps}",
        (
            Fix("sampling.num_inference_steps={fitted_steps}"),
            *SKIP_BY_CHANGE,
            Fix(
                f"make them for that number: {CALIBRATE} cache=teacache sampling.num_inference_steps={{steps}}"
                " input.prompts=prompts.txt",
                can_skip,
            ),
        ),
    ),
    CompatibilityRule(
        "cache.gate",
        lambda config: (
            as_whole_number(get_gate(config).get("first")) + as_whole_number(get_gate(config).get("last"))
            >= get_step_count(config)
        ),
        "the first and last steps are always computed and cover all {steps}: there is none to skip",
        (
            Fix("cache.gate.first=1 cache.gate.last=0", lambda config: get_step_count(config) > 1),
            Fix("sampling.num_inference_steps={gate_steps}"),
            Fix("cache=none", lambda config: get_step_count(config) < 2),
        ),
    ),
    CompatibilityRule(
        "cache.gate.steps",
        # a Heun scheduler has up to twice as many steps
        lambda config: any(
            as_whole_number(step) >= 2 * get_step_count(config) - 1
            for step in as_sequence(get_gate(config).get("steps"))
        ),
        "a step is listed that a run of {steps} does not have",
        (Fix("cache.gate.steps={listed}", lambda config: bool(list_existing_steps(config))), Fix("cache=none")),
    ),
    CompatibilityRule(
        "cache.gate.steps",
        lambda config: (
            (get_gate(config).get("num_inference_steps") or get_step_count(config)) != get_step_count(config)
        ),
        "the list of computed steps is for another sampling.num_inference_steps than {steps}",
        (
            Fix("sampling.num_inference_steps={list_steps}"),
            *SKIP_BY_COUNT,
            Fix(
                f"make a list for {{steps}}: {CALIBRATE} cache=mask cache.budget=0.5"
                " sampling.num_inference_steps={steps} input.prompts=prompts.txt"
            ),
        ),
    ),
    CompatibilityRule(
        "cache",
        lambda config: uses_step_density(config) and get_step_count(config) < 8,
        "the densities are made for 8 steps and more, not {steps}",
        (Fix("sampling.num_inference_steps=8"), *SKIP_BY_COUNT),
    ),
    CompatibilityRule(
        "cache.max_warmup_steps",
        lambda config: as_whole_number(config["cache"].get("max_warmup_steps")) >= get_step_count(config),
        "the warm-up alone takes all {steps} steps: there is none to skip",
        (
            Fix("cache.max_warmup_steps=1", lambda config: get_step_count(config) > 1),
            Fix("sampling.num_inference_steps={warmup_steps}"),
            Fix("cache=none", lambda config: get_step_count(config) < 2),
        ),
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
        (Fix("parallel.cfg_degree=1"), *INSTEAD_OF_CACHE_DIT),
    ),
    CompatibilityRule(
        "model.guidance.layers",
        lambda config: (
            bool(find_skipped_layers(config)) and get_degree(config, "hsdp") > 1 and get_degree(config, "cfg") > 1
        ),
        "ranks that predict the negative prompt run one forward less, and would miss HSDP's gathers of weights",
        (Fix("parallel.cfg_degree=1"), Fix("model.guidance.layers=null")),
    ),
    CompatibilityRule(
        "parallel.cfg_degree",
        lambda config: get_degree(config, "cfg") > 1 and not uses_guidance(config),
        "with guidance off, or only as an input of the model, there is one branch to predict",
        (Fix("parallel.cfg_degree=1"), *GUIDE),
    ),
    CompatibilityRule(
        "parallel.cfg_degree",
        lambda config: get_degree(config, "cfg") > 2,
        "guidance has two branches, the prompt's and the negative prompt's",
        (Fix("parallel.cfg_degree=2"),),
    ),
    CompatibilityRule(
        "parallel.data_degree",
        lambda config: get_degree(config, "data") > count_batch_pictures(config),
        "there are fewer pictures than ranks to draw them",
        (Fix("parallel.data_degree=1"), *MORE_PICTURES),
    ),
    CompatibilityRule(
        "parallel.hsdp_degree",
        lambda config: (
            get_degree(config, "hsdp") > 1 and get_degree(config, "data") > 1 and encodes_prompts_singly(config)
        ),
        "model {model} encodes one prompt at a time: ranks with fewer prompts would miss HSDP's gathers of weights",
        (Fix("parallel.data_degree=1"),),
    ),
    CompatibilityRule(
        "parallel.ring_degree",
        lambda config: get_degree(config, "ring") > 1 and not uses_option(config, "attention", "SDPA"),
        "ring attention needs the log-sum-exp of the scores, which this attention kernel does not return here",
        (Fix("attention=sdpa"), Fix("parallel.ring_degree=1 parallel.ulysses_degree={ring_as_ulysses}")),
    ),
    CompatibilityRule(
        "report.noise_floor",
        lambda config: get_degree(config, "ring") > 1 and bool({*config["report"]["noise_floor"]} - {REPEAT}),
        "ring attention needs the log-sum-exp of the scores, which the other attention kernels do not return here",
        (Fix("report.noise_floor=[repeat]"), Fix("parallel.ring_degree=1 parallel.ulysses_degree={ring_as_ulysses}")),
    ),
    CompatibilityRule(
        "parallel.vae_degree",
        lambda config: get_degree(config, "vae") > 1 and draws_sounds(config),
        "ranks share the rows of a picture, and a sound has none",
        (Fix("parallel.vae_degree=1"), Fix("parallel.vae_degree=1 vae.tiling=true, which decodes with less memory")),
    ),
    CompatibilityRule(
        "vae.channels_last",
        lambda config: config["vae"]["channels_last"] and draws_sounds(config),
        "it is a layout of pictures, and model {model} draws sounds",
        (Fix("vae.channels_last=false"),),
    ),
    CompatibilityRule(
        "parallel.vae_degree",
        lambda config: get_degree(config, "vae") > 1 and config["vae"]["tiling"],
        "each rank decodes its rows of the picture, which replaces tiles",
        (Fix("vae.tiling=false"),),
    ),
    CompatibilityRule(
        "compile",
        lambda config: (
            uses_option(config, "compile", "CompileFull")
            and any(get_degree(config, name) > 1 for name in ("ring", "ulysses", "tensor", "hsdp"))
        ),
        "ranks communicate between the layers, and compile=full makes the transformer one graph",
        (Fix("compile=blocks"),),
    ),
    CompatibilityRule(
        "compile",
        lambda config: uses_option(config, "compile", "CompileFull") and uses_option(config, "cache", "CacheDiT"),
        "cache-dit runs the transformer block by block, and compile=full makes it one graph",
        (Fix("compile=blocks"), *INSTEAD_OF_CACHE_DIT),
    ),
    CompatibilityRule(
        "quantization",
        lambda config: "transformer" in find_quantized(config) and get_degree(config, "tensor") > 1,
        "each rank's shard of a row would have a scale of its own, and the picture would depend on the number of ranks",
        (Fix("quantization=none"), Fix("parallel.tensor_degree=1 parallel.ulysses_degree={tensor_as_ulysses}")),
    ),
    CompatibilityRule(
        "quantization",
        lambda config: bool(find_quantized(config)) and get_degree(config, "hsdp") > 1,
        "HSDP cannot shard quantized weights",
        (Fix("quantization=none"), Fix("parallel.hsdp_degree=1")),
    ),
    CompatibilityRule(
        "quantization",
        lambda config: config["quantization"].get("weights") == "int8" and config["dtype"] == "float16",
        "products with int8 weights exceed float16's range before they are scaled",
        (Fix("quantization=none"), Fix("dtype=bfloat16")),
    ),
    CompatibilityRule(
        "quantization",
        lambda config: uses_float8_activations(config) and config["dtype"] not in ("auto", "bfloat16"),
        "products of float8 weights and activations, with a scale for each row, have dtype bfloat16",
        (Fix("quantization=none"), Fix("dtype=bfloat16")),
    ),
    CompatibilityRule(
        "quantization",
        lambda config: uses_float8_activations(config) and config["device"] == "cpu",
        "float8 numbers are multiplied by GPUs only",
        (Fix("quantization=none"), Fix("quantization=fp8_weight_only")),
    ),
    CompatibilityRule(
        "offload",
        lambda config: uses_offload(config, *MOVING) and get_degree(config, "hsdp") > 1,
        "HSDP keeps each rank's shard of the weights on its device",
        (Fix("offload=none"),),
    ),
    CompatibilityRule(
        "offload",
        lambda config: uses_offload(config, "Expert") and config["model"]["experts"] < 2,
        "model {model} has one transformer: there is no expert to swap",
        (Fix("offload=none"),),
    ),
    CompatibilityRule(
        "offload",
        lambda config: uses_offload(config, "Expert", "Model", "Layerwise") and config["device"] == "cpu",
        "on device=cpu the host is the device: there is nothing to offload to",
        (Fix("offload=none"),),
    ),
    CompatibilityRule(
        "offload",
        lambda config: uses_offload(config, "Disk") and "transformer" in find_quantized(config),
        "the blocks are read from their files in every step, and would be quantized again each time",
        (
            Fix("quantization=none"),
            Fix("offload=layerwise, which keeps them quantized on the host", lambda config: config["device"] != "cpu"),
        ),
    ),
    CompatibilityRule(
        "compile",
        lambda config: uses_offload(config, "Layerwise", "Disk") and uses_option(config, "compile", "CompileFull"),
        "in one graph no block can wait until its weights are loaded",
        (Fix("compile=blocks"),),
    ),
    CompatibilityRule(
        "compile.mode",
        lambda config: uses_offload(config, "Layerwise", "Disk") and uses_cuda_graphs(config),
        "a CUDA graph reads weights at the addresses it was recorded with, and the blocks' weights move",
        (Fix("compile.mode=default"),),
    ),
    CompatibilityRule(
        "offload",
        lambda config: (
            uses_option(config, "offload", "ModulationOffload") and "modulation" not in config["model"]["facts"]
        ),
        "the blocks of model {model} have no modulation weights of their own",
        (Fix("offload=none"),),
    ),
)


def find_violations(config: Config) -> Iterator[CompatibilityRule]:
    """Yield the broken rules."""
    return (rule for rule in RULES if rule.broken(config))


def format_violations(config: Config) -> list[str]:
    """Return one line for each broken rule."""
    return [rule.format(config) for rule in find_violations(config)]


def check_compatibility(config: Config) -> None:
    """Raise `UsageError` with one line for each rule that any line of `input.prompts` breaks."""
    raise_mistakes(text for _, one in iterate_lines(dict(config)) for text in format_violations(one))
