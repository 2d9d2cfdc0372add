"""Small runs on any device, and the memory of each stage on a fake device."""

from __future__ import annotations

import gc
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from hydrarun.config.checks.values import find_cfg_scale, get_unguided_scale
from hydrarun.config.compose import compose_config, compose_unchecked
from hydrarun.core.timing import Timings
from hydrarun.engine.runner import Runner
from hydrarun.pipeline.request import make_state
from hydrarun.pipeline.stage import Stage
from tests.helpers import subjects
from tests.helpers.subjects import LONG, SHORT


def runner(subject: subjects.Subject, device: str, option: str = "none", **arguments: int) -> Runner:
    """Build a runner for the smallest run of the subject, with an option of `offload` and its arguments."""
    offload = {**options(option), **arguments}
    return Runner({**smallest(subject.name, subject.folder), "offload": offload, "device": device})


@cache
def smallest(name: str, folder: Path) -> dict[str, Any]:
    """Compose the configuration of the smallest run; images are encoded at 64 x 64 pixels instead of a megapixel."""
    sides = [f"sampling.{key}={value}" for key, value in subjects.sized(name, folder, 2, 2).items()]
    config = compose_config([*subjects.command(name, folder), *sides])
    for stage in config["model"]["stages"]:
        if stage["_target_"].endswith("EncodeImages"):
            stage["area"] = 64 * 64
    return config


@cache
def options(name: str) -> dict[str, Any]:
    """Return the node of an option of `offload`."""
    return compose_unchecked([f"offload={name}"])[0]["offload"]


def draw(runner: Runner, guided: bool = True) -> Any:
    """Draw two prompts of unequal length; return the finished state."""
    config = runner.config
    scale = find_cfg_scale(config)[0]
    fields = {
        "prompt": [SHORT, LONG],
        "seed": [3, 4],
        "negative_prompt": "x",
        "num_inference_steps": 2,
        scale: 3.0 if guided else get_unguided_scale(config),
    }
    if "max_sequence_length" in config["model"]["takes"]:
        fields["max_sequence_length"] = 64
    given = subjects.pictures(config["model"]["input_images"][0], config)
    state = make_state({**config["sampling"], **fields}, given)
    return runner.draw(state, Timings(runner.built.parts.device))


def modules(runner: Runner) -> dict[str, nn.Module]:
    """Return all modules with weights, by their names in the checkpoint."""
    parts = runner.built.parts
    named = {name: module for name, module in parts.pipeline.components.items() if isinstance(module, nn.Module)}
    return named | parts.experts.transformers


def weights(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


def size(module: nn.Module) -> int:
    """Return the bytes of a module's weights; tied weights count once."""
    return sum(tensor.nbytes for tensor in weights(module))


def on_device(runner: Runner) -> dict[str, int]:
    """Return the bytes of weights on the device by component. Check that each component is on a single device."""
    found = {}
    for name, module in modules(runner).items():
        kinds = {tensor.device.type for tensor in weights(module)}
        assert len(kinds) == 1, (name, kinds)
        if kinds == {"fake"}:
            found[name] = size(module)
    return found


@dataclass
class Watched(Stage):
    """A stage that records which weights are on the device when it runs, and the peak memory."""

    stage: Stage
    runner: Runner
    fake: Any
    there: dict[str, int] = field(default_factory=dict)
    coming: int = 0  # the peak while its weights are onloaded
    peak: int = 0

    def __post_init__(self) -> None:
        self.needs, self.gives, self.uses, self.phase = (
            self.stage.needs,
            self.stage.gives,
            self.stage.uses,
            self.stage.phase,
        )

    def __call__(self, state, parts, timings) -> None:
        self.coming = self.fake.max_memory_allocated()
        self.fake.reset_peak_memory_stats()
        self.stage(state, parts, timings)
        self.peak = self.fake.max_memory_allocated()
        self.there = on_device(self.runner)  # after the call, because the stage itself selects the expert
        self.fake.reset_peak_memory_stats()


@dataclass
class Measured:
    """The outputs of a run, the weights on the device in each stage, and the memory on top of that before the run."""

    latents: np.ndarray
    frames: np.ndarray
    uses: list[tuple[str, ...]]
    there: list[dict[str, int]]
    activations: list[int]
    peak: int


def measured(runner: Runner, fake: Any, guided: bool = True) -> Measured:
    """Measure a run of a warm runner, whose one-time data such as modulation tables exist already."""
    plain = runner.built.stages
    watched = [Watched(stage, runner, fake) for stage in plain]
    gc.collect()
    floor = fake.memory_allocated() - sum(on_device(runner).values())
    fake.reset_peak_memory_stats()
    runner.built.stages = watched
    try:
        state = draw(runner, guided)
    finally:
        runner.built.stages = plain
    return Measured(
        state.latents.cpu().numpy(),
        state.frames,
        [stage.uses for stage in watched],
        [stage.there for stage in watched],
        [stage.peak - floor - sum(stage.there.values()) for stage in watched],
        max(max(stage.peak, stage.coming) for stage in watched) - floor,
    )


def steps(runner: Runner, fake: Any, guided: bool) -> tuple[torch.Tensor, list[tuple[str, int, int]]]:
    """Draw; return the latents, and for each step its expert, the bytes at its end and the peak bytes."""
    loop = next(stage for stage in runner.built.stages if "transformer" in stage.uses)
    original, found = loop.predict, []
    gc.collect()
    tensors = (tensor for module in modules(runner).values() for tensor in weights(module))
    floor = fake.memory_allocated() - sum(tensor.nbytes for tensor in tensors if tensor.device.type == "fake")

    def predict(*given: Any) -> Any:
        fake.reset_peak_memory_stats()
        prediction = original(*given)
        found.append((given[4].expert, fake.memory_allocated() - floor, fake.max_memory_allocated() - floor))
        return prediction

    loop.predict = predict
    try:
        return draw(runner, guided).latents, found
    finally:
        del loop.predict
