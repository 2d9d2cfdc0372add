"""Offload on a fake accelerator: the same pictures, and exactly the bytes that each stage uses on the device."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hydrarun.acceleration.offload.strategies import USES, ExpertOffload, ModelOffload, find_use
from hydrarun.config.checks.compatibility import find_violations
from hydrarun.config.compose import compose_unchecked
from hydrarun.core.errors import UsageError
from hydrarun.engine.runner import Runner
from hydrarun.pipeline import components
from hydrarun.pipeline.stage import Stage, check_stages
from tests.helpers import parallel_runs
from tests.helpers.subjects import LONG, SHORT, SORTS
from tests.helpers.watched import Measured, draw, measured, modules, on_device, runner, size, weights

TWO_EXPERTS = "wan22_t2v_a14b"
UNREAD = (lambda name: None, Path(), torch.float32)  # `read`, `folder` and `dtype`, unused here
SAME = 1e-6  # relative to the largest latent; CPU kernels called in another way


@pytest.fixture(scope="module")
def kept() -> dict[tuple[str, str], Any]:
    """Results of plain runs, by model and device."""
    return {}


def on_the_cpu(subject, kept) -> Any:
    """Return the state of the plain run on the CPU."""
    if (subject.name, "cpu") not in kept:
        kept[subject.name, "cpu"] = draw(runner(subject, "cpu"))
    return kept[subject.name, "cpu"]


def plain(subject, fake, kept) -> dict[bool, Measured]:
    """Return the runs with everything on the fake device, with and without guidance."""
    if (subject.name, "fake") not in kept:
        drawn = warm(subject, "none")
        kept[subject.name, "fake"] = {guided: measured(drawn, fake, guided) for guided in (True, False)}
    return kept[subject.name, "fake"]


def warm(subject, option: str) -> Runner:
    """Return a runner on the fake device that has drawn once."""
    drawn = runner(subject, "fake", option)
    draw(drawn)
    return drawn


def test_the_fake_device_counts_bytes_and_refuses_the_hosts_tensors(fake):
    before = fake.memory_allocated()
    x = torch.ones(3, 5, device="fake")
    assert fake.memory_allocated() - before == 60
    for operation in (torch.add, torch.nn.functional.linear, lambda a, b: torch.cat([a, b])):
        with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
            operation(x, torch.ones(3, 5))
    with pytest.raises(RuntimeError, match="convolution got one on cpu"):
        nn.functional.conv2d(x[None, None], torch.ones(1, 1, 2, 2))
    assert (x + torch.tensor(2.0)).sum().item() == 45
    del x
    assert fake.memory_allocated() == before
    assert fake.max_memory_allocated() >= before + 60


@pytest.mark.sample(2)
@pytest.mark.parametrize("subject", SORTS, indirect=True)
def test_a_device_draws_what_the_cpu_draws(subject, fake, kept):
    got, want = plain(subject, fake, kept)[True], on_the_cpu(subject, kept)
    latents = want.latents.numpy()
    np.testing.assert_allclose(got.latents, latents, atol=SAME * np.abs(latents).max())
    assert np.abs(got.frames.astype(int) - want.frames).max() <= 1


@pytest.mark.sample(2)
@pytest.mark.parametrize("subject", SORTS, indirect=True)
def test_model_offload_peaks_at_the_largest_phase(subject, fake, kept):
    """Every stage holds exactly the bytes of what it uses, plus the plain run's activations."""
    offloaded = warm(subject, "model")
    sizes = {name: size(module) for name, module in modules(offloaded).items()}
    for guided, want in plain(subject, fake, kept).items():
        got = measured(offloaded, fake, guided)
        assert np.array_equal(got.latents, want.latents)
        assert np.array_equal(got.frames, want.frames)
        there = {"vae": sizes["vae"]}  # from the previous run
        for uses, found in zip(got.uses, got.there, strict=True):
            there = {name: sizes[name] for name in sizes if name in in_use(uses, found)} if uses else there
            assert found == there
        assert got.activations == want.activations
        phases = [sum(there.values()) + more for there, more in zip(got.there, want.activations, strict=True)]
        assert got.peak == max(phases) < want.peak


def in_use(uses: tuple[str, ...], there: dict[str, int]) -> set[str]:
    """Return the used components; of two experts the second, which runs the last steps."""
    encoders = {f"text_encoder{number}" for number in ("", "_2", "_3")} | {
        "vision_language_encoder",
        "projection_model",
    }
    names = {"text_encoder": encoders, "vae": {"vae"}}
    expert = {"transformer_2"} if "transformer_2" in there else {"transformer"}
    return set().union(*(names.get(use, expert) for use in uses))


@pytest.mark.parametrize("subject", ["flux_dev", "qwen_image_edit", TWO_EXPERTS], indirect=True)
def test_text_encoder_offload_lets_it_go_once_prompts_are_encoded(subject, fake, kept):
    want = plain(subject, fake, kept)[True]
    offloaded = warm(subject, "text_encoder")
    encoders = {name for name in modules(offloaded) if find_use(name) == "text_encoder"}
    got = measured(offloaded, fake)
    assert np.array_equal(got.latents, want.latents)
    encoding = False
    for uses, there in zip(got.uses, got.there, strict=True):
        encoding = "text_encoder" in uses if uses else encoding
        assert set(there) == set(modules(offloaded)) - (set() if encoding else encoders)
    assert got.activations == want.activations


@pytest.mark.sample(2)
@pytest.mark.parametrize("subject", SORTS, indirect=True)
def test_on_the_cpu_the_text_encoder_is_let_go_of_and_read_again(subject, kept, monkeypatch):
    """Two requests in a row: the same numbers, and the files are read for the second."""
    read = []
    original = components.load_module
    monkeypatch.setattr("hydrarun.engine.build.load_module", lambda *asked: read.append(asked[2]) or original(*asked))
    want = on_the_cpu(subject, kept)
    offloaded = runner(subject, "cpu", "text_encoder")
    encoders = {name: module for name, module in modules(offloaded).items() if find_use(name) == "text_encoder"}
    for request in range(2):
        alive = [weakref.ref(tensor) for module in encoders.values() for tensor in weights(module)]
        got = draw(offloaded)
        assert torch.equal(got.latents, want.latents)
        assert read == [*encoders] * request
        assert not any(tensor() for tensor in alive)
        assert {tensor.device.type for module in encoders.values() for tensor in weights(module)} == {"meta"}


@pytest.mark.parametrize("subject", [TWO_EXPERTS], indirect=True)
def test_of_two_experts_one_is_on_the_device(subject, fake, kept):
    want = plain(subject, fake, kept)[True]
    offloaded = warm(subject, "expert")
    steps = []
    loop = next(stage for stage in offloaded.built.stages if "transformer" in stage.uses)
    original = loop.predict
    loop.predict = lambda *given: (original(*given), steps.append({*on_device(offloaded)} - {"text_encoder", "vae"}))[0]
    got = measured(offloaded, fake)
    assert np.array_equal(got.latents, want.latents)
    assert steps == [{"transformer"}, {"transformer_2"}]
    assert got.activations == want.activations
    sizes = {name: size(module) for name, module in modules(offloaded).items()}
    assert want.peak - got.peak == sizes["transformer"] + sizes["transformer_2"]  # the peak is in encoding here


def test_an_expert_leaves_before_the_other_comes(fake):
    offload = ExpertOffload()
    experts = {"transformer": nn.Linear(64, 64), "transformer_2": nn.Linear(64, 64)}
    offload.attach(experts, torch.device("fake"), *UNREAD)
    before = fake.memory_allocated()
    fake.reset_peak_memory_stats()
    for name in (*experts, *experts):
        offload.load_expert(name)
        assert [other for other in experts if experts[other].weight.device.type == "fake"] == [name]
    assert fake.max_memory_allocated() - before == size(experts["transformer"])


@pytest.mark.parametrize("subject", ["demo"], indirect=True)
def test_a_run_records_the_devices_peak(subject, fake):
    drawn = runner(subject, "fake", "model")
    fake.reset_peak_memory_stats()
    draw(drawn)
    assert (
        drawn.measure_memory()["peak_device_bytes"] == fake.max_memory_allocated() > size(modules(drawn)["transformer"])
    )


@pytest.mark.parametrize("subject", ["flux_dev"], indirect=True)
def test_two_ranks_let_their_text_encoders_go(subject, pool):
    """Each rank has one branch; two requests, so that the encoders are read again."""
    fields = {"prompt": [SHORT, LONG], "seed": [3, 4], "negative_prompt": "x", "true_cfg_scale": 3.0}
    want = subject.draw(**fields).latents.numpy()
    for latents, kinds in pool(
        2, parallel_runs.draw_offloaded, subject.name, subject.folder, {"cfg_degree": 2}, fields
    ):
        np.testing.assert_allclose(latents, want, atol=1e-4)
        assert kinds == {"meta"}


def test_a_stage_names_what_it_uses():
    assert all(set(vars(stage).get("uses", ())) <= set(USES) for stage in Stage.__subclasses__())

    class Typo(Stage):
        uses = ("text_encoders",)

    with pytest.raises(
        UsageError, match=r"Typo\): a stage can use text_encoder, transformer, vae, not 'text_encoders'\."
    ):
        check_stages([Typo()])


def test_a_stage_that_uses_nothing_moves_nothing(fake):
    offload = ModelOffload()
    pair = {"vae": nn.Linear(2, 2), "text_encoder_2": nn.Linear(2, 2)}
    offload.attach(pair, torch.device("fake"), *UNREAD)
    for uses, want in [(("vae",), "vae"), ((), "vae"), (("text_encoder",), "text_encoder_2"), ((), "text_encoder_2")]:
        offload.prepare_stage(uses)
        assert [name for name, module in pair.items() if module.weight.device.type == "fake"] == [want]


@pytest.mark.parametrize("option", ["expert", "model", "text_encoder", "layerwise", "disk"])
def test_what_offload_does_not_go_with(option):
    asked = [f"model={TWO_EXPERTS}", "sampling.prompt=a", f"offload={option}"]
    broken = {
        device: [*find_violations(compose_unchecked([*asked, f"device={device}"])[0])] for device in ("cpu", "cuda")
    }
    assert len(broken["cpu"]) == (option not in ("text_encoder", "disk"))
    assert broken["cuda"] == []
    (rule,) = find_violations(compose_unchecked([*asked, "parallel=hsdp2"])[0])
    assert rule.sentence == "HSDP keeps each rank's shard of the weights on its device"
    for parallel in ("ulysses2", "cfg2", "vae2", "tp2"):
        assert not [*find_violations(compose_unchecked([*asked, f"parallel={parallel}"])[0])]
