"""Compares the other numbers of a plan with formulas, published figures and real runs."""

from __future__ import annotations

import gc
import re

import pytest
import torch

from hydrarun.acceleration.offload.strategies import NoOffload
from hydrarun.acceleration.quantization import count_stored_bytes
from hydrarun.config.compose import compose_config, compose_unchecked
from hydrarun.config.targets import load_class
from hydrarun.engine.plan import configs
from hydrarun.engine.plan.devices import read_devices
from hydrarun.engine.plan.estimate import build_meta_transformer, run_dry_forward
from hydrarun.engine.plan.memory_model import WeightSettings
from hydrarun.engine.plan.planner import plan_configuration
from hydrarun.engine.plan.weights import count_active_bytes, measure_transformer
from hydrarun.engine.runner import Runner
from tests.engine.plan.test_memory_model import FAKE, SAME, asked, measured, runner
from tests.helpers import parallel_runs
from tests.helpers.paths import ROOT
from tests.helpers.subjects import CONFIGS, MODELS

PUBLISHED = [name for name in MODELS if "shapes" in CONFIGS[name]["model"]["facts"] and name != "demo"]


def numbers(text: str) -> float:
    """Parse `20.4B`, or one of `2 x 14.3B`."""
    return float(text.rpartition(" ")[2].removesuffix("B")) * 1e9


@pytest.mark.sample(7)
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_shapes_have_as_many_parameters_as_is_published(name):
    """To the last published digit. Weights kept in float32 count double in bytes, but are few."""
    facts = CONFIGS[name]["model"]["facts"]
    cls = load_class(CONFIGS[name]["model"]["transformer"], "model.transformer")
    known = configs.read_known_shapes(facts["shapes"])
    found = measure_transformer("transformer", build_meta_transformer(cls, known, "transformer", torch.bfloat16, None))
    assert found.all.plain / 2 == pytest.approx(numbers(facts["parameters"]), abs=0.06e9)
    if "modulation" in facts:
        assert found.all.modulation / 2 == pytest.approx(numbers(facts["modulation"]), abs=0.06e9)


def test_the_operations_of_a_forward_are_those_of_its_sizes():
    """Qwen-Image at 1024 x 1024: linear layers 2 x tokens x weights, attention 4 x tokens^2 x width in each block."""
    config, _ = compose_unchecked(
        ["model=qwen_image", "sampling.prompt=a", "sampling.height=1024", "sampling.width=1024"]
    )
    made = plan_configuration(config, read_devices()["h100"], 1)
    assert made.asked is not None
    per_forward = made.asked.phases[1].flops / made.steps / 2
    tokens = 64 * 64 + 6  # a prompt of one letter and the end of the template
    dim, blocks = 3072, 60
    linear = 2 * blocks * tokens * 12 * dim**2
    attention = 4 * blocks * tokens**2 * dim
    assert per_forward == pytest.approx(linear + attention, rel=0.01)
    assert linear / 1e12 == pytest.approx(56, abs=0.5)
    assert attention / 1e12 == pytest.approx(12.4, abs=0.5)


def test_blocks_of_another_kind_count_as_many_as_they_are():
    """Stable Diffusion 3.5 Medium: in 13 of 24 blocks images attend twice, and in the last the text is only read."""
    config, _ = compose_unchecked(["model=sd35_medium", "sampling.prompt=a"])
    made = plan_configuration(config, read_devices()["h100"], 1)
    assert made.asked is not None
    image, text, dim = 64 * 64, 77 + 256, 1536
    linear = 2 * dim**2 * (image * (24 * 12 + 13 * 4) + text * (23 * 12 + 3))
    attention = 4 * dim * (24 * (image + text) ** 2 + 13 * image**2)
    assert made.asked.phases[1].flops / made.steps / 2 == pytest.approx(linear + attention, rel=2e-3)


def test_a_third_prediction_of_some_steps_counts():
    """Skip-layer guidance of Stable Diffusion 3.5 Medium in the steps 1 to 7 of 40, as if it ran all blocks."""
    plain, guided = (
        plan_configuration(
            compose_unchecked(["model=sd35_medium", "sampling.prompt=a", *words])[0], read_devices()["h100"], 1
        )
        for words in ([], ["model.guidance.layers=[7,8,9]"])
    )
    assert plain.asked is not None
    assert guided.asked is not None
    flops = plain.asked.phases[1].flops
    assert guided.asked.phases[1].flops == pytest.approx(flops * (1 + 7 / 80), rel=1e-6)


@pytest.mark.parametrize("subject", ["qwen_image", "wan22_t2v_a14b"], indirect=True)
@pytest.mark.parametrize("chosen", [{"ulysses_degree": 2}, {"tensor_degree": 2}, {"cfg_degree": 2}])
def test_ranks_send_what_the_plan_expects(subject, chosen, pool):
    config = {**asked(subject.runner.config, guided=True), "parallel": parallel_runs.degrees(**chosen)}
    _, _, sent = pool(2, parallel_runs.draw, subject.name, subject.folder, chosen, 0, config["sampling"])[0]
    made = plan_configuration({**config, "dtype": "float32"}, FAKE, 2)
    assert made.asked is not None
    assert sum(phase.sent for phase in made.asked.phases) == sum(sent.values())


@pytest.mark.parametrize("subject", ["demo"], indirect=True)
@pytest.mark.parametrize("words", [["cache=every_n", "cache/predictor=taylor"], ["cache=dbcache_taylorseer"]])
def test_what_a_cache_keeps_is_planned(subject, words, fake):
    gc.collect()
    before = fake.memory_allocated()
    drawn = runner(subject, "none", "sampling.num_inference_steps=8", *words)
    config = asked(drawn.config, guided=True) | {"sampling": drawn.config["sampling"]}
    made = plan_configuration({**config, "dtype": "float32"}, FAKE, 1)
    assert made.asked is not None
    denoise = made.asked.phases[1]
    assert measured(drawn, config, fake, before)["denoise"] == pytest.approx(denoise.peak, rel=SAME)
    assert denoise.cache > 0
    if words[0] == "cache=every_n":  # two residuals per branch, of 2 x 2 tokens in float32
        transformer = drawn.built.parts.experts.config
        width = transformer["num_attention_heads"] * transformer["attention_head_dim"]
        assert denoise.cache == 2 * 2 * (2 * 2) * width * 4


@pytest.mark.parametrize("subject", ["qwen_image", "wan22_t2v_a14b"], indirect=True)
@pytest.mark.parametrize(
    ("option", "components"), [("int8_weight_only", "[transformer,text_encoder]"), ("fp8_weight_only", "[transformer]")]
)
def test_quantized_weights_take_what_the_plan_expects(subject, option, components):
    """To the byte."""
    words = [*subject.overrides(), f"quantization={option}", f"quantization.components={components}"]
    drawn = Runner(compose_config(words))
    dry_run = run_dry_forward(drawn.config, configs.read_folder_configs(subject.folder), torch.float32)
    held = WeightSettings.from_config(drawn.config).make_layout(dry_run)
    built = drawn.built.parts
    modules = {name: value for name, value in built.pipeline.components.items() if isinstance(value, torch.nn.Module)}
    for name, module in (modules | built.experts.transformers).items():
        stored = sum(count_stored_bytes(tensor) for tensor in (*module.parameters(), *module.buffers()))
        (component,) = (one for one in dry_run.components if one.name == name)
        assert count_active_bytes(component, held, NoOffload()) == stored, name


@pytest.mark.parametrize("subject", ["flux_dev", "wan22_t2v_a14b"], indirect=True)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_weights_take_what_the_plan_expects(subject, dtype):
    """To the byte, with the modules that libraries and we keep in float32."""
    drawn = Runner(compose_config([*subject.overrides(), f"dtype={dtype}"]))
    dry_run = run_dry_forward(drawn.config, configs.read_folder_configs(subject.folder), getattr(torch, dtype))
    built = drawn.built.parts
    for name, module in (built.pipeline.components | built.experts.transformers).items():
        if isinstance(module, torch.nn.Module):
            (component,) = (one for one in dry_run.components if one.name == name)
            stored = sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
            assert component.all.plain == stored, name


def test_the_devices_that_are_named_are_those_that_are_known():
    page, option = (ROOT / "docs" / "plan.md").read_text(), (ROOT / "conf" / "plan" / "none.yaml").read_text()
    for name in read_devices():
        assert re.search(rf"\b{name}\b", page)
        assert re.search(rf"\b{name}\b", option)
