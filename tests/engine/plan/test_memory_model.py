"""Compares the plan with the bytes that a fake accelerator counts: every phase, with every offload, within 5 %.

Sizes of weights are exact. Activations come from the same code on the meta device. They differ in how a device's
kernels make their outputs (a norm in one piece or several), and in what a pipeline's own prompt encoding keeps alive.
"""

from __future__ import annotations

import dataclasses
import gc
from dataclasses import dataclass
from typing import Any

import pytest

from hydrarun.config.checks.compatibility import find_violations
from hydrarun.config.checks.values import find_cfg_scale
from hydrarun.config.compose import compose_config
from hydrarun.core.resources import read_options
from hydrarun.core.timing import Timings
from hydrarun.engine.plan.devices import DeviceSpec
from hydrarun.engine.plan.memory_model import PHASES
from hydrarun.engine.plan.planner import plan_configuration
from hydrarun.engine.runner import Runner
from hydrarun.pipeline.request import make_state
from hydrarun.pipeline.stage import Stage
from tests.helpers import midsize, subjects
from tests.helpers.subjects import CONFIGS, LONG, SHORT, Subject

SAME = 0.05
FAKE = DeviceSpec("fake", 2**40, "cuda", float16=1e12, link=1e9, host=1e9)
#: tried with every offload
MODELS = ("demo", "qwen_image", "wan22_t2v_a14b")


@pytest.fixture(scope="module")
def larger(tmp_path_factory) -> dict[str, Subject]:
    """Mid-size checkpoints made so far, by the subject's name."""
    return {}


def enlarged(subject: Subject, larger: dict[str, Subject], tmp_path_factory) -> Subject:
    """Return the subject with wider transformers; the demo is unchanged."""
    if subject.name not in midsize.TRANSFORMERS:
        return subject
    if subject.name not in larger:
        folder = midsize.saved(subject.name, subject.folder, tmp_path_factory.mktemp("midsize") / subject.name)
        larger[subject.name] = dataclasses.replace(subject, folder=folder)
    return larger[subject.name]


def runner(subject: Subject, option: str, *more: str) -> Runner:
    """The smallest run of the subject on the fake device."""
    words = [word for word in subject.overrides() if word != "device=cpu"]
    sides = [f"sampling.{key}={value}" for key, value in subject.size(2, 2).items()]
    return Runner({**compose_config([*words, *sides, f"offload={option}", *more]), "device": "fake"})


def asked(config: dict[str, Any], guided: bool) -> dict[str, Any]:
    """Two prompts of unequal length in two steps."""
    fields = {"prompt": [SHORT, LONG], "seed": [3, 4], "negative_prompt": "x", "num_inference_steps": 2}
    fields[find_cfg_scale(config)[0]] = 3.0 if guided else 1.0
    if "max_sequence_length" in config["model"]["takes"]:
        fields["max_sequence_length"] = 64
    return {**config, "sampling": {**config["sampling"], **fields}}


@dataclass
class Watched(Stage):
    """A stage that records the peak bytes on the device while it runs, with its weights onloaded."""

    stage: Stage
    fake: Any
    peak: int = 0

    def __post_init__(self) -> None:
        self.needs, self.gives = self.stage.needs, self.stage.gives
        self.uses, self.phase = self.stage.uses, self.stage.phase

    def __call__(self, state, parts, timings) -> None:
        self.fake.reset_peak_memory_stats()
        self.stage(state, parts, timings)
        self.peak = self.fake.max_memory_allocated()


def measured(drawn: Runner, config: dict[str, Any], fake: Any, before: int) -> dict[str, int]:
    """Return each phase's peak bytes above `before`, from the first stage that uses weights on."""
    plain = drawn.built.stages
    drawn.built.stages = [Watched(stage, fake) for stage in plain]
    given = subjects.pictures(config["model"]["input_images"][0], config)
    drawn.draw(make_state(config["sampling"], given), Timings(drawn.built.parts.device))
    watched, drawn.built.stages = drawn.built.stages, plain
    found = dict.fromkeys(PHASES, 0)
    for stage in watched[next(place for place, stage in enumerate(watched) if stage.uses) :]:
        found[stage.phase] = max(found[stage.phase], stage.peak - before)
    return found


def offloads(model: str) -> list[str]:
    """Return the offloads that are compatible with the model on an accelerator."""
    config = {**CONFIGS[model], "device": "cuda"}
    return [
        name for name, node in read_options("offload").items() if not any(find_violations({**config, "offload": node}))
    ]


@pytest.mark.sample(5)
@pytest.mark.parametrize(
    ("subject", "option"), [(model, option) for model in MODELS for option in offloads(model)], indirect=["subject"]
)
def test_every_phase_takes_what_the_plan_expects(subject, option, fake, larger, tmp_path_factory):
    chosen = enlarged(subject, larger, tmp_path_factory)
    gc.collect()
    before = fake.memory_allocated()
    drawn = runner(chosen, option)
    for guided in (True, False):
        config = asked(drawn.config, guided)
        made = plan_configuration({**config, "dtype": "float32"}, FAKE, 1)
        assert made.asked is not None
        want = {phase.name: phase.peak for phase in made.asked.phases}
        assert measured(drawn, config, fake, before) == pytest.approx(want, rel=SAME)


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("subject", "words"),
    [
        ("qwen_image", ["quantization=int8_weight_only", "dtype=float32"]),  # unpacked one at a time
        ("wan22_t2v_a14b", ["dtype=bfloat16"]),
        ("sd35_medium", ["dtype=float32"]),  # blocks of three kinds
    ],
    indirect=["subject"],
)
def test_it_does_with_other_numbers_too(subject, words, fake, larger, tmp_path_factory):
    chosen = enlarged(subject, larger, tmp_path_factory)
    gc.collect()
    before = fake.memory_allocated()
    drawn = runner(chosen, "none", *words)
    config = asked(drawn.config, guided=True)
    made = plan_configuration(config, FAKE, 1)
    assert made.asked is not None
    want = {phase.name: phase.peak for phase in made.asked.phases}
    assert measured(drawn, config, fake, before) == pytest.approx(want, rel=SAME)
