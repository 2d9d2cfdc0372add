"""The shipped model: it is small, draws the same pictures in diffusers, and follows its prompts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import QwenImagePipeline

from hydrarun.cli.recipe import evidence
from hydrarun.config.compose import compose_config
from hydrarun.config.recipes import search
from hydrarun.engine.runner import Runner
from hydrarun.engine.runs.single import run_single
from hydrarun.outputs.media import png
from hydrarun.outputs.quality.scene_judge import judge_pairs, sample_held_out_prompts
from tests.helpers import tiny

MAX_BYTES = 10e6


@pytest.fixture(scope="module")
def runner() -> Runner:
    return Runner(compose_config(["device=cpu", "dtype=float32"]))


def test_size(demo_folder):
    assert sum(path.stat().st_size for path in demo_folder.rglob("*") if path.is_file()) <= MAX_BYTES


def test_diffusers_loads_it_and_draws_the_same(runner, demo_folder):
    pipeline = QwenImagePipeline.from_pretrained(demo_folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    state = tiny.draw(runner, seed=7)
    theirs = tiny.reference(pipeline, state, "np")
    assert np.abs(state.frames[:, 0].astype(int) - (theirs * 255).round().astype(int)).max() <= 1


def test_it_is_an_ordinary_checkpoint_of_the_family(runner, demo_folder):
    """The default model equals `model=qwen_image` on this folder with the same settings."""
    settings = {key: runner.config["sampling"][key] for key in ("prompt", "true_cfg_scale", "num_inference_steps")}
    config = tiny.config(demo_folder, "sampling.height=128", "sampling.width=128")
    (by_path,) = Runner(config).generate(**settings)
    (by_name,) = runner.generate()
    assert (by_path.pixels == by_name.pixels).all()


@pytest.mark.parametrize("changes", [{}, {"true_cfg_scale": 1.0}])
def test_it_draws_what_it_is_told(runner, changes):
    """At most one of every tenth of the 200 held-out prompts is wrong (docs/demo-model.md has the results on all)."""
    prompts = sample_held_out_prompts()[::10]
    pictures = runner.generate(prompt=prompts, seed=list(range(20)), **changes)
    result = judge_pairs((picture.pixels, picture.prompt) for picture in pictures)
    assert result.right >= 0.95, result


def test_another_prompt_is_judged_wrong(runner):
    """The test above can fail: the judge rejects the same pictures with other captions."""
    prompts = sample_held_out_prompts()[:8]
    pictures = runner.generate(prompt=prompts, seed=list(range(8)), num_inference_steps=8)
    shifted = [*prompts[1:], prompts[0]]
    assert judge_pairs((p.pixels, other) for p, other in zip(pictures, shifted, strict=True)).right == 0


@pytest.mark.parametrize(("name", "count"), [("demo/quick", 1), ("demo/grid", 6), ("demo/teacache", 4)])
def test_shipped_recipes_run_and_draw_what_they_say(name, count, tmp_path):
    """Every picture of a shipped recipe passes the judge and matches its evidence."""
    config = compose_config([f"recipe={name}", "device=cpu", "dtype=float32"])
    record = run_single(Runner(config), config, tmp_path)
    pictures = [(png.read_png(tmp_path / output["path"])[0], output["prompt"]) for output in record["outputs"]]
    assert len(pictures) == count
    assert judge_pairs(pictures).right == 1
    found = evidence.compare_evidence(
        search.load_recipe(name).evidence.measured, evidence.measure_run(record, tmp_path, None)
    )
    assert "different" not in {verdict.result for verdict in found.outputs}
