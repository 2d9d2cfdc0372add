"""A whole run: options that keep the result, the content of run.json, refusals before weights are read."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

import hydrarun
from hydrarun.cli.main import dispatch_verb
from hydrarun.core.errors import OutOfMemoryError, RunError, UsageError
from hydrarun.engine import build
from hydrarun.engine.runner import Runner
from hydrarun.engine.runs.single import run_single
from hydrarun.models.weights.safetensors import Header
from tests.helpers import tiny


def test_compiled_blocks_equal_plain_ones(tiny_folder, tiny_runner):
    """Equal up to rounding. The blocks are compiled into one graph, which prompts of one length share."""
    from torch._dynamo.utils import counters

    counters.clear()
    compiled = tiny.runner(tiny_folder, "compile=blocks")
    prompts = {"prompt": "a cat", "negative_prompt": "a dog"}
    have, want = (tiny.draw(runner, **prompts).latents for runner in (compiled, tiny_runner))
    assert (have - want).abs().max() < 1e-4
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.full
def test_flex_attention_equals_the_default(tiny_folder, tiny_runner):
    prompts = ["a", "a much longer prompt"]
    flex = tiny.runner(tiny_folder, "attention=flex")
    assert flex.collect_facts()["attention"] == "flex"
    assert (tiny.draw(flex, prompt=prompts).latents - tiny.draw(tiny_runner, prompt=prompts).latents).abs().max() < 1e-4


def test_vae_slicing_is_exact(tiny_folder, tiny_runner):
    sliced = tiny.runner(tiny_folder, "vae.slicing=true").generate(num_images_per_prompt=3)
    whole = tiny_runner.generate(num_images_per_prompt=3)
    for have, want in zip(sliced, whole, strict=True):
        assert np.abs(have.pixels.astype(int) - want.pixels.astype(int)).max() <= 1


def test_vae_tiling_equals_diffusers_tiling(tiny_folder, tiny_pipeline):
    """Tiling changes the picture slightly, exactly as the reference's tiling does."""
    runner = tiny.runner(tiny_folder, "vae.tiling=true")
    vae = runner.built.parts.pipeline.vae
    vae.enable_tiling(32, 32, 24, 24)  # min height and width, stride of both: small enough for this picture
    state = tiny.draw(runner, num_inference_steps=2)
    plain = tiny.draw(tiny.runner(tiny_folder), num_inference_steps=2)
    assert (state.frames != plain.frames).any()
    tiny_pipeline.vae.enable_tiling(32, 32, 24, 24)
    try:
        want = tiny.reference(tiny_pipeline, state, "np")
    finally:
        tiny_pipeline.vae.disable_tiling()
    assert np.abs(state.frames[:, 0].astype(int) - (want * 255).round().astype(int)).max() <= 1


def test_run_json_says_what_happened(tiny_folder, tmp_path):
    runner = tiny.runner(tiny_folder, "sampling.num_images_per_prompt=2", "sampling.seed=11")
    record = run_single(runner, runner.config, tmp_path)
    assert record == json.loads((tmp_path / "run.json").read_text())
    timings = record["timings"]
    assert len(timings["steps_s"]) == 4
    assert sum(timings["steps_s"]) <= timings["denoise_s"]
    parts = sum(timings[f"{name}_s"] for name in ("load", "encode", "denoise", "decode"))
    assert 0 < parts <= timings["total_s"]
    weights = sum(path.stat().st_size - Header.read(path).start for path in tiny_folder.glob("*/*.safetensors"))
    assert timings["read_bytes"] == weights
    assert weights / timings["load_s"] < timings["read_bytes_per_s"] < float("inf")
    assert record["memory"]["peak_host_bytes"] > 100e6  # torch alone is more
    assert record["attention"] == "sdpa"
    assert record["dtype"] == "float32"
    assert record["verified"] is False
    assert len(record["weights"]["fingerprint"]) == 16
    assert [output["seed"] for output in record["outputs"]] == [11, 12]
    for output in record["outputs"]:
        assert (tmp_path / output["path"]).is_file()


def test_a_run_with_the_weights_of_an_earlier_one_has_read_nothing(tiny_folder):
    runner = tiny.runner(tiny_folder)
    runner.read_bytes = 0  # as a rank sets it before its next job
    assert runner.summarize_reads() == {"read_bytes": 0, "read_bytes_per_s": None}


@pytest.mark.parametrize(
    ("components", "order"),
    [
        (None, ["transformer", "others"]),
        ("[text_encoder]", ["transformer", "others"]),
        ("[transformer]", ["others", "transformer"]),
    ],
)
def test_what_is_loaded_at_the_same_time(tiny_folder, monkeypatch, components, order):
    """The transformer is read while the libraries load the other components; a quantized one, after them."""
    seen = []
    for name, function in (("transformer", build.load_transformer), ("others", build.load_pipeline)):

        def watched(*arguments, name=name, function=function, **options):
            seen.append(name)
            return function(*arguments, **options)

        monkeypatch.setattr(build, function.__name__, watched)
    more = ["quantization=int8_weight_only", f"quantization.components={components}"] if components else []
    tiny.runner(tiny_folder, *more)
    assert seen == order


def test_the_python_api_draws_what_the_command_draws(tiny_folder, tiny_runner):
    runner = hydrarun.load(*tiny.overrides(tiny_folder))
    (picture,) = runner.generate(prompt="a dog", seed=3)
    (want,) = tiny_runner.generate(prompt="a dog", seed=3)
    assert (picture.prompt, picture.seed, picture.negative_prompt) == ("a dog", 3, " ")
    assert (picture.pixels == want.pixels).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hieght": 64}, "no field 'hieght'. Did you mean 'height'"),
        ({"height": 60}, "sampling.height=60: this checkpoint needs a multiple of 8: .*height=56 or .*height=64"),
        ({"width": 4}, "sampling.width=4: .*multiple of 8: sampling.width=8"),
        ({"guidance_scale": 3.5}, "sampling.guidance_scale: model qwen_image does not take it.*true_cfg_scale"),
        ({"negative_prompt": None}, "negative_prompt"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"prompt": ["x" * 60_000] * 2}, "more than 100000 characters in all"),
    ],
)
def test_requests_that_cannot_be(tiny_runner, change, message):
    with pytest.raises(UsageError, match=message):
        tiny_runner.generate(**change)


def test_a_wrong_size_is_refused_before_weights_are_read(tiny_folder, tmp_path):
    """Also without composing: the Python API and replay create a Runner directly."""
    folder = shutil.copytree(tiny_folder, tmp_path / "x", ignore=shutil.ignore_patterns("*.safetensors"))
    config = tiny.config(folder)
    config["sampling"]["height"] = 60
    with pytest.raises(UsageError, match="multiple of 8"):
        Runner(config)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the refusal is that of a machine without a GPU")
def test_a_device_that_is_not_there(tiny_folder):
    with pytest.raises(UsageError, match="device=cuda: torch sees 0 CUDA devices here; use device=cpu"):
        Runner(tiny.config(tiny_folder, "device=cuda"))


def test_a_refused_picture_loses_none_of_the_others(tiny_folder, tmp_path, monkeypatch, capsys):
    """The second of three is black: the others are written, keep their places, and replay."""
    runner = tiny.runner(tiny_folder, "sampling.num_images_per_prompt=3")
    original = runner.draw

    def draw(state, timings, cache):
        original(state, timings, cache).frames[1] = 0
        return state

    monkeypatch.setattr(runner, "draw", draw)
    with pytest.raises(RunError, match="all black"):
        run_single(runner, runner.config, tmp_path / "run")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["status"] == "failed"
    assert [(output["index"], output["seed"]) for output in record["outputs"]] == [(0, 0), (2, 2)]
    assert dispatch_verb(["replay", str(tmp_path / "run" / "run.json"), f"hydra.run.dir={tmp_path / 'again'}"]) == 0
    assert capsys.readouterr().out.count("identical pixels") == 2


@pytest.mark.parametrize(("component", "message"), [("transformer", "latents are NaN"), ("vae", "VAE decoded NaN")])
def test_nan_is_an_error_and_no_file(tiny_folder, tmp_path, component, message):
    runner = tiny.runner(tiny_folder)
    parts = runner.built.parts
    module = parts.experts["transformer"] if component == "transformer" else parts.pipeline.vae
    with torch.no_grad():
        next(p for p in reversed(list(module.parameters()))).fill_(torch.nan)
    with pytest.raises(RunError, match=message):
        run_single(runner, runner.config, tmp_path)
    assert not list(tmp_path.glob("*.png"))
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "failed"


@pytest.mark.parametrize("allocate", [lambda: torch.empty(10**14), lambda: np.empty(10**15)])
def test_host_memory_that_runs_out_is_one_line_with_the_phase(tiny_folder, monkeypatch, allocate):
    runner = tiny.runner(tiny_folder)
    monkeypatch.setattr(build.load_class(runner.config["model"]["stages"][-1]), "__call__", lambda *_: allocate())
    with pytest.raises(OutOfMemoryError, match=r"^out of memory in decode: on the host, .* shows settings that fit$"):
        runner.generate()
    monkeypatch.setattr(build, "load_pipeline", lambda *_, **__: allocate())
    with pytest.raises(OutOfMemoryError, match=r"^out of memory in loading: on the host, .* shows settings that fit$"):
        tiny.runner(tiny_folder)
