"""Checks the values of a composed configuration: presence, types, ranges, and consistency between fields.

`checkpoint.py` checks what depends on the checkpoint, such as the sizes that its VAE supports.
"""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from hydrarun.config import batches, prompts
from hydrarun.config.bounds import (
    BOUNDS,
    MAX_DEVICE_INDEX,
    find_bound_problems,
    find_wide_numbers,
)
from hydrarun.config.checks import items, report
from hydrarun.config.schema import MISSING, Config, TeaCacheFit
from hydrarun.config.type_check import describe_hint, format_value, matches_hint
from hydrarun.core.distributed import degrees
from hydrarun.core.errors import raise_mistakes, suggest_name
from hydrarun.core.inputs import image_paths
from hydrarun.core.nested import iterate_leaves
from hydrarun.outputs.media import kinds

DTYPES = ("auto", "float32", "bfloat16", "float16")
EXPERTS = ("transformer", "transformer_2")
#: fields of `sampling` that not every model takes; NEEDED are those that must be set if the model takes them
OPTIONAL = (
    "negative_prompt",
    "true_cfg_scale",
    "guidance_scale",
    "guidance_scale_2",
    "num_frames",
    "layers",
    "resolution",
    "max_sequence_length",
    "audio_start_in_s",
    "audio_end_in_s",
)
NEEDED = ("num_frames", "layers", "resolution", "max_sequence_length", "audio_start_in_s")

Problem = tuple[str, str]  # key, sentence


def check_values(config: Mapping[str, Any], origin: Callable[[str], str] | None = None) -> None:
    """Raise UsageError with one line for each violation. `origin` returns where a key's value came from."""

    def place(line: batches.Line | None, key: str) -> str:
        if line and key.partition(".")[2] in line:
            return f" (line {line.get(batches.LINE, '?')} of input.prompts)"
        return f" ({origin(key)})" if origin else ""

    raise_mistakes(f"{key}{place(line, key)}: {text}" for line, key, text in _find_line_problems(config))


def find_problems(config: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield every violation in a plain, resolved configuration."""
    return ((key, text) for _, key, text in _find_line_problems(config))


def _find_line_problems(config: Mapping[str, Any]) -> Iterator[tuple[batches.Line | None, str, str]]:
    """Yield every violation, with the line of `input.prompts` that causes it, or None."""
    shape = list(_check_shape(config))
    yield from ((None, *problem) for problem in shape)
    if shape:
        return
    yield from ((None, *problem) for problem in _check_settings(config))
    broken = list(_check_model(config["model"])) or list(_check_batches(config))
    yield from ((None, *problem) for problem in broken)
    if not broken:  # the checks below rely on a valid section `model`
        yield from ((None, *problem) for problem in _check_output(config))
        for line, one in batches.iterate_lines(dict(config)):
            yield from ((line, *problem) for problem in _check_request(one))


def _check_shape(config: Mapping[str, Any]) -> Iterator[Problem]:
    """Check keys, types and missing values. With `input.prompts`, `sampling.prompt` may be missing."""
    wrong = [*find_wide_numbers(config), *_find_broken_texts(config)] or list(_check_structure(config, Config, ""))
    yield from wrong
    prompted = not wrong and config["input"]["prompts"] is not None
    yield from (problem for problem in _find_missing(config) if not (prompted and problem[0] == "sampling.prompt"))


def _check_settings(config: Mapping[str, Any]) -> Iterator[Problem]:
    """Check the settings that do not depend on the request: device, dtype, degrees, plan and TeaCache's fit."""
    yield from _check_device(config["device"])
    yield from _check_dtype(config["dtype"])
    yield from ((f"parallel.{key}", text) for key, text in degrees.find_degree_problems(config["parallel"]))
    yield from _check_minimum("parallel.max_ranks", config["parallel"]["max_ranks"], 1)
    yield from find_bound_problems(config, "scheduler")
    yield from _check_vae_dtype(config["vae"]["dtype"])
    yield from _check_plan(config["plan"])
    yield from _check_teacache_fit(
        "cache.gate.fit", (config["cache"].get("gate") or {}).get("fit"), config["model"]["experts"]
    )


def _check_request(config: Mapping[str, Any]) -> Iterator[Problem]:
    """Check a request: `sampling`, input images and `report`."""
    yield from _check_taken_fields(config["model"], config["sampling"])
    yield from _check_sampling(config["sampling"], config["model"])
    yield from _check_warmup(config["warmup"], config["sampling"]["num_inference_steps"])
    yield from _check_guidance(config)
    yield from _check_size(config)
    yield from _check_input_images(config)
    yield from report.find_problems(config)


def _check_batches(config: Mapping[str, Any]) -> Iterator[Problem]:
    """Check the number of pictures, the settings of batch runs, and the lines of `input.prompts`."""
    yield from find_bound_problems(config, "")
    if not batches.is_batch_run(config):
        for name in ("retry", "fail_fast"):
            if config[name]:
                yield name, "without input.prompts or batch_size it has no effect: all pictures are one batch."
    lines = config["input"]["prompts"]
    if lines is None:
        yield from items.find_total_problem(config)
        return
    if not (isinstance(lines, list) and lines):
        yield "input.prompts", f"{format_value(lines)} is not a file or a list of prompts."
        return
    broken = list(_check_lines(lines))
    yield from broken or items.find_total_problem(config)
    for name in ("seed", "negative_prompt"):
        if isinstance(config["sampling"][name], list):
            yield f"sampling.{name}", "lists several: with input.prompts give one for all, or one in each line."


def _check_lines(lines: list[Any]) -> Iterator[Problem]:
    for number, line in enumerate(lines, start=1):
        own = {name: value for name, value in line.items() if name != batches.LINE} if isinstance(line, dict) else line
        yield from (("input.prompts", f"number {number}: {text}.") for text in prompts.find_line_problems(own))


def find_cfg_scale(config: Mapping[str, Any]) -> tuple[str, float | None]:
    """Return the name and value of the field of `sampling` that holds the model's classifier-free guidance scale."""
    name = config["model"]["guidance"].get("scale", "true_cfg_scale")
    return name, config["sampling"].get(name)


def get_unguided_scale(config: Mapping[str, Any]) -> float:
    """Return the largest scale that means no guidance for this model."""
    return config["model"]["guidance"].get("unguided", 1)


def is_video(config: Mapping[str, Any]) -> bool:
    """Return whether the model draws videos."""
    return kinds.find_model_kind(config["model"]) is kinds.VIDEO


def has_captioner(model: Mapping[str, Any]) -> bool:
    """Return whether the model captions its input image when the prompt is blank."""
    return any(str(stage.get("_target_", "")).endswith(".EncodePromptOrCaption") for stage in model["stages"])


def _check_structure(node: Any, section: type, path: str) -> Iterator[Problem]:
    """Check keys and types of the fixed sections. Hydra checks them too, except for keys added with `+`."""
    if not isinstance(node, Mapping):
        yield path or "configuration", "is not a mapping."
        return
    hints = typing.get_type_hints(section)
    for key in node:
        if key not in hints:
            yield f"{path}{key}", f"unknown key.{suggest_name(str(key), hints)} Known: {', '.join(hints)}."
    for key, hint in hints.items():
        if key not in node:
            yield f"{path}{key}", "is missing."
        elif dataclasses.is_dataclass(hint):
            yield from _check_structure(node[key], typing.cast(type, hint), f"{path}{key}.")
        elif node[key] != MISSING and not matches_hint(node[key], hint):
            yield f"{path}{key}", f"{format_value(node[key])} is not {describe_hint(hint)}."


def _find_broken_texts(config: Any) -> Iterator[Problem]:
    """Yield the texts that are no valid Unicode: no file can hold them, and no tokenizer reads them."""
    for path, value in iterate_leaves(config):
        if isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError as error:
                yield path, f"holds half of a surrogate pair, character {error.start + 1}, which is no text."


def _find_missing(config: Any) -> Iterator[Problem]:
    for path, value in iterate_leaves(config):
        if value == MISSING:
            yield path, "is missing: set it, " + (f'{path}="…"' if path in ("sampling.prompt",) else f"{path}=…")


def _check_device(device: str) -> Iterator[Problem]:
    match = re.fullmatch(r"auto|cpu|cuda(?::(0|[1-9][0-9]{0,3}))?", device)
    if match is None or int(match[1] or 0) > MAX_DEVICE_INDEX:
        yield (
            "device",
            f"{device!r} is none of auto, cpu, cuda, cuda:0, cuda:1… cuda:{MAX_DEVICE_INDEX}."
            f"{suggest_name(device, ('auto', 'cpu', 'cuda'))}",
        )


def _check_dtype(dtype: str) -> Iterator[Problem]:
    if dtype not in DTYPES:
        yield "dtype", f"{dtype!r} is none of {', '.join(DTYPES)}.{suggest_name(dtype, DTYPES)}"


def _check_vae_dtype(dtype: str | None) -> Iterator[Problem]:
    if dtype is not None and dtype not in DTYPES[1:]:
        yield "vae.dtype", f"{dtype!r} is none of null, {', '.join(DTYPES[1:])}.{suggest_name(dtype, DTYPES[1:])}"


def _check_plan(plan: Mapping[str, Any]) -> Iterator[Problem]:
    if plan["device"] is not None and not plan["auto"]:
        yield "plan.device", "a run uses the device of this machine: set it with `hydrarun plan`, or with plan=auto."


def _check_model(model: Mapping[str, Any]) -> Iterator[Problem]:
    for key, names in (("takes", model["takes"]), ("limits", model["limits"])):
        for name in names:
            if name not in OPTIONAL:
                yield f"model.{key}", f"{name!r} is none of {', '.join(OPTIONAL)}.{suggest_name(str(name), OPTIONAL)}"
    for name, limit in model["limits"].items():
        each = limit if isinstance(limit, list) else [limit]
        if not each or not all(matches_hint(one, int) for one in each):
            yield f"model.limits.{name}", f"{format_value(limit)} is not a whole number or a list of them."
    counts = model["input_images"]
    if not (len(counts) == 2 and all(matches_hint(n, int) for n in counts) and 0 <= counts[0] <= counts[1]):
        yield "model.input_images", f"{format_value(counts)} is not [least, most]."
    yield from find_bound_problems({"model": model}, "model")
    yield from _check_teacache_fit("model.teacache", model["teacache"], model["experts"])
    if model["judge"] not in (None, *report.JUDGES):
        yield "model.judge", f"{model['judge']!r} is none of null, {', '.join(report.JUDGES)}."


def _check_teacache_fit(where: str, fit: Any, experts: int) -> Iterator[Problem]:
    """Check a `TeaCacheFit` at the key `where`."""
    if fit is None:
        return
    broken = list(_check_structure(fit, TeaCacheFit, f"{where}."))
    yield from broken
    if broken:
        return
    for name in EXPERTS[:experts]:
        if not fit["coefficients"].get(name):
            yield f"{where}.coefficients", f"has none for {name}."
    counts = fit["num_inference_steps"]
    if counts is not None and not (len(counts) == 2 and 1 <= counts[0] <= counts[1]):
        yield f"{where}.num_inference_steps", f"{format_value(counts)} is not [least, most]."


def _check_taken_fields(model: Mapping[str, Any], sampling: Mapping[str, Any]) -> Iterator[Problem]:
    """Check that fields the model does not take are null, and that fields it needs are set."""
    for key in OPTIONAL:
        value = sampling[key]
        if key not in model["takes"]:
            if value is not None:
                taken = ", ".join(model["takes"])
                yield f"sampling.{key}", f"model {model['name']} does not take it; its optional fields: {taken}."
        elif value is None and key in NEEDED:
            yield f"sampling.{key}", f"null, and model {model['name']} needs it."
        elif key in model["limits"] and value is not None:
            yield from _check_limit(f"sampling.{key}", value, model["limits"][key], model["name"])


def _check_limit(key: str, value: float, limit: Any, name: str) -> Iterator[Problem]:
    """Check a value against a limit: a number is the maximum, a list holds all allowed values."""
    if isinstance(limit, list):
        if value not in limit:
            yield key, f"{value} is none of {', '.join(map(str, limit))}, which model {name} takes."
    elif value > limit:
        yield key, f"{value} is above {limit}, the most that model {name} takes."


def _check_sampling(sampling: Mapping[str, Any], model: Mapping[str, Any]) -> Iterator[Problem]:
    taken = [name for name in BOUNDS["sampling"] if name not in OPTIONAL or name in model["takes"]]
    yield from find_bound_problems({"sampling": sampling}, "sampling", taken)
    yield from items.find_problems(sampling, has_captioner(model))


def _check_minimum(key: str, value: int | None, least: int) -> Iterator[Problem]:
    if value is not None and value < least:
        yield key, f"{value} is below {least}."


def _check_warmup(count: int, steps: int) -> Iterator[Problem]:
    yield from _check_minimum("warmup", count, 0)
    if count > max(steps, 0):
        yield (
            "warmup",
            f"{count} is above sampling.num_inference_steps={steps}: it runs the first steps of a run.",
        )


def _check_guidance(config: Mapping[str, Any]) -> Iterator[Problem]:
    (name, scale), off = find_cfg_scale(config), get_unguided_scale(config)
    if name in config["model"]["takes"] and scale is None:
        yield f"sampling.{name}", f"null; {off:g} turns guidance off."
    model = config["model"]
    can_do_without = "negative_prompt" not in model["takes"] or model["guidance"].get("unprompted")
    if can_do_without or config["sampling"]["negative_prompt"] is not None:
        return
    if scale is not None and off < scale < math.inf:
        yield (
            "sampling.negative_prompt",
            f"null, but {name}={scale} guides away from it: set"
            f' sampling.negative_prompt=" ", or sampling.{name}={off:g} for no guidance.',
        )


def _check_size(config: Mapping[str, Any]) -> Iterator[Problem]:
    model, sizeless = config["model"], kinds.find_model_kind(config["model"]) is kinds.SOUND
    for key in ("height", "width"):
        value = config["sampling"][key]
        if sizeless and value is not None:
            yield f"sampling.{key}", f"model {model['name']} does not take it: it draws sounds."
        if not sizeless and value is None and model["input_images"][1] == 0:
            yield f"sampling.{key}", f"null, and model {model['name']} has no input image to take it from."


def _check_input_images(config: Mapping[str, Any]) -> Iterator[Problem]:
    given, (least, most) = config["input"]["images"], config["model"]["input_images"]
    if not (
        given is None
        or isinstance(given, str)
        or (isinstance(given, list) and all(matches_hint(p, str) for p in given))
    ):
        yield "input.images", f"{format_value(given)} is not a file or a list of files."
        return
    count, name = len(image_paths(config)), config["model"]["name"]
    if count > most:
        least_and_most = f"{least}" if least == most else f"{least} to {most}"
        listed = "1 image" if count == 1 else f"{count} images"
        taken = f"{least_and_most}." if most else "none: input.images=null."
        yield "input.images", f"lists {listed}; model {name} takes {taken}"
    elif count < least:
        yield "input.images", f"model {name} needs {least}: input.images=picture.png"


def _check_output(config: Mapping[str, Any]) -> Iterator[Problem]:
    output, name = config["output"], config["model"]["name"]
    kind = kinds.find_model_kind(config["model"])
    if output["format"] not in kind.formats:
        yield "output.format", f"{output['format']!r}: model {name} draws {kind.many}: {' or '.join(kind.formats)}."
    if is_video(config):
        if output["fps"] is None:
            yield "output.fps", "null: a video needs frames per second, output.fps=16"
        yield from find_bound_problems(config, "output")
    elif output["fps"] is not None:
        yield "output.fps", f"{output['fps']}: model {name} draws {kind.many}, which have none."
