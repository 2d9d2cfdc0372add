"""Checks the section `report`: metrics, judge, noise floor and objectives. Imports nothing heavy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hydrarun.core import resources
from hydrarun.core.errors import suggest_name
from hydrarun.outputs.media import kinds

#: metrics between an output and its reference run; METRICS adds those of an output by itself
PAIRED = ("psnr", "ssim", "snr")
METRICS = (*PAIRED, "accuracy")

#: numbers of every run that a sweeper can search by, in addition to the metrics
MEASURED = ("total_s", "denoise_s", "steady_step_s", "peak_host_bytes", "peak_device_bytes")

#: the entry of the noise floor that draws the reference run again; other entries are options of `attention`
REPEAT = "repeat"

#: allowed values of `model.judge`
JUDGES = ("scenes",)

#: smallest side, in pixels, that the judge accepts
SMALLEST_SIDE = 64

LPIPS = (
    "'lpips': the published packages ship only its linear layers (as pickles); the network underneath, AlexNet or VGG "
    "from torchvision, would have to be downloaded, and nothing is downloaded to measure. Use psnr, ssim."
)

Problem = tuple[str, str]  # key, sentence


def find_problems(config: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield every violation in `report`. The rest of the configuration must be valid."""
    report = config["report"]
    names = [name for name in report["metrics"] if name != "lpips"]
    if len(names) < len(report["metrics"]):
        yield "report.metrics", LPIPS
    yield from _check_names("report.metrics", names, METRICS)
    yield from _check_metric_kinds(config, names)
    if "accuracy" in names:
        yield from _check_judge(config)
    yield from _check_noise_floor(config)
    yield from _check_objectives(report)
    if not report["twins"]:
        yield "report.twins", "names no folder: report.twins=outputs/twins"


def _check_names(key: str, names: Sequence[str], known: Sequence[str]) -> Iterator[Problem]:
    for name, count in Counter(names).items():
        if name not in known:
            yield key, f"{name!r} is none of {', '.join(known)}.{suggest_name(name, known)}"
        elif count > 1:
            yield key, f"lists {name!r} {'twice' if count == 2 else f'{count} times'}."


def _check_metric_kinds(config: Mapping[str, Any], names: Sequence[str]) -> Iterator[Problem]:
    """Yield the metrics that do not apply to what the model draws: pictures and sounds have different ones."""
    kind, model = kinds.find_model_kind(config["model"]), config["model"]["name"]
    for name in names:
        if name in PAIRED and name not in kind.metrics:
            others = ", ".join(other.many for other in kinds.KINDS if name in other.metrics)
            known = ", ".join(kind.metrics)
            yield "report.metrics", f"{name!r} measures {others}, but model {model} draws {kind.many}. Use {known}."


def _check_judge(config: Mapping[str, Any]) -> Iterator[Problem]:
    """Check that the judge of `accuracy` supports the picture size and the prompts."""
    model, sampling = config["model"], config["sampling"]
    if model["judge"] is None:
        known = ", ".join(kinds.find_model_kind(config["model"]).metrics)
        yield "report.metrics", f"'accuracy': model {model['name']} has no judge (model.judge). Use {known}."
        return
    height, width = sampling["height"], sampling["width"]
    if height != width or (height or 0) < SMALLEST_SIDE:
        yield (
            "report.metrics",
            f"'accuracy' judges square pictures of at least {SMALLEST_SIDE} pixels a side, not {width}x{height}.",
        )
    from hydrarun.outputs.quality.scenes import parse_caption  # imports numpy and Pillow only here

    prompts = sampling["prompt"]
    for prompt in prompts if isinstance(prompts, list) else [prompts]:
        try:
            parse_caption(prompt)
        except ValueError as error:
            yield "report.metrics", f"'accuracy' judges only scenes as docs/demo-model.md words them: {error}."
            return


def _check_noise_floor(config: Mapping[str, Any]) -> Iterator[Problem]:
    metrics, names = config["report"]["metrics"], config["report"]["noise_floor"]
    attention = resources.read_options("attention")
    yield from _check_names("report.noise_floor", names, (REPEAT, *attention))
    if names and not metrics:
        yield "report.noise_floor", "without report.metrics it has no effect: report.metrics=[psnr,ssim]"
    for name in names:
        if attention.get(name) == config["attention"]:
            yield "report.noise_floor", f"{name!r} is the run's own attention: use {REPEAT} to draw with it again."


def _check_objectives(report: Mapping[str, Any]) -> Iterator[Problem]:
    names, metrics = report["objectives"], report["metrics"]
    yield from _check_names("report.objectives", names, (*MEASURED, *METRICS))
    for name in names:
        if name in METRICS and name not in metrics:
            yield "report.objectives", f"{name!r} is not measured: report.metrics=[{','.join([*metrics, name])}]"
