"""Stable Diffusion 3.5: details that the parity tests of whole runs do not cover."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from hydrarun.acceleration.compilation import CompileFull
from hydrarun.config.compose import compose_config
from hydrarun.core.errors import UsageError
from hydrarun.core.timing import Timings
from hydrarun.engine.runner import Runner
from hydrarun.models.sd3 import SD3Transformer
from hydrarun.pipeline.request import make_state
from tests.helpers import checkpoints, parallel_runs, tiny
from tests.helpers.caches import node
from tests.helpers.matrix import uncompiled
from tests.helpers.subjects import LONG

TOLERANCE = 1e-5  # float32, the same operations in another order
LATENTS = 1e-4  # of whole runs
#: skip-layer guidance in the steps 1 and 2 of 6
LAYERS = ["model.guidance.layers=[1]", "model.guidance.stop=0.5"]
GUIDED: dict[str, Any] = {"guidance_scale": 3.0, "negative_prompt": LONG, "num_inference_steps": 6}


class Skipping(StableDiffusion3Pipeline):
    """diffusers' pipeline with skip-layer guidance."""

    @functools.wraps(StableDiffusion3Pipeline.__call__)
    def __call__(self, **arguments: Any) -> Any:
        return super().__call__(**arguments, skip_guidance_layers=[1], skip_layer_guidance_stop=0.5)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """diffusers' transformer, and ours loaded from the files it saved."""
    reference = checkpoints.BUILDERS["sd35_medium"]().transformer
    with torch.no_grad():  # make all positions differ: pure sines are equal in some channels
        reference.pos_embed.pos_embed.add_(
            torch.randn(reference.pos_embed.pos_embed.shape, generator=torch.Generator().manual_seed(1))
        )
    folder = tmp_path_factory.mktemp("transformer")
    reference.save_pretrained(folder)
    return reference, tiny.load_transformer(SD3Transformer, folder)


@pytest.fixture(scope="module")
def skipping():
    """Runners with skip-layer guidance, by model."""
    return {}


@pytest.fixture
def pushed(subject, skipping):
    """The subject with skip-layer guidance."""
    if subject.name not in skipping:
        skipping[subject.name] = replace(subject, runner=Runner(compose_config([*subject.overrides(), *LAYERS])))
    return skipping[subject.name]


@pytest.mark.parametrize(("rows", "columns"), [(3, 5), (4, 1), (12, 11)])
@torch.no_grad()
def test_one_call_and_its_gate_signal(pair, rows, columns):
    """Compares the prediction and the input of the first block's attention. Positions come from the table's middle."""
    reference, ours = pair
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 2 * rows, 2 * columns, generator=generator)
    text, pooled = torch.randn(2, 7, 48, generator=generator), torch.randn(2, 40, generator=generator)
    timestep = torch.tensor([713.0, 713.0])
    seen = []
    hook = reference.transformer_blocks[0].attn.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True
    )
    want = reference(latents, text, pooled, timestep, return_dict=False)[0]
    hook.remove()
    given = {"encoder_hidden_states": text, "pooled_projections": pooled}
    assert want.std() > 0.1
    latents = latents.unsqueeze(2)
    assert (tiny.predict(ours, latents, timestep, given).squeeze(2) - want).abs().max() <= TOLERANCE
    assert (ours.gate_signal(ours.embed(latents, timestep, **given)) - seen[0]).abs().max() <= TOLERANCE


def test_the_text_ends_in_the_last_block(pair):
    """Layers with unused output have no parameters."""
    _, ours = pair
    last, before = ours.blocks[-1].text, ours.blocks[-2].text
    assert {name.partition(".")[0] for name, _ in last.named_parameters()} == {"modulation", "qkv", "norm_q", "norm_k"}
    assert [block.image.modulation.parts for block in ours.blocks] == [9, 6, 6]
    assert (before.modulation.parts, last.modulation.parts) == (6, 2)


def test_stable_diffusion_3_is_refused_by_name():
    with pytest.raises(UsageError, match="qk_norm=None: only Stable Diffusion 3.5's"), torch.device("meta"):
        SD3Transformer(num_layers=1, qk_norm=None)


@pytest.mark.parametrize("subject", ["sd35_medium"], indirect=True)
def test_skip_layer_guidance_equals_diffusers(subject, pushed):
    state = pushed.draw(**GUIDED)
    pipeline = Skipping(**subject.pipeline.components)
    pipeline.set_progress_bar_config(disable=True)
    theirs = tiny.reference(pipeline, state, "latent")
    assert (theirs - state.latents).abs().max() <= LATENTS
    assert (subject.draw(**GUIDED).latents - state.latents).abs().max() > 100 * LATENTS


@pytest.mark.parametrize("subject", ["sd35_medium"], indirect=True)
def test_skip_layer_guidance_needs_guidance(subject, pushed):
    unguided = {**GUIDED, "guidance_scale": 1.0}
    assert torch.equal(pushed.draw(**unguided).latents, subject.draw(**unguided).latents)


@pytest.mark.parametrize("subject", ["sd35_medium"], indirect=True)
def test_caches_leave_the_third_prediction_alone(pushed):
    """If nothing is skipped, the result equals the plain run. The record lists only the two cached branches."""
    want = pushed.draw(**GUIDED).latents
    dbcache = {"_target_": "hydrarun.acceleration.cache.cache_dit.CacheDiT", "residual_diff_threshold": 0.0}
    for cache in (node("first_block", threshold=0), dbcache):
        have = pushed.draw(cache=cache, **GUIDED).latents
        assert (have - want).abs().max() <= TOLERANCE
        steps = pushed.runner.built.parts.cache.record()["steps"]["transformer"]
        assert steps == {branch: {"computed": [*range(6)], "skipped": []} for branch in ("positive", "negative")}


@pytest.mark.parametrize("subject", ["sd35_medium"], indirect=True)
def test_modulation_tables_serve_the_third_prediction(subject, pushed):
    tabled = replace(subject, runner=Runner(compose_config([*subject.overrides(), *LAYERS, "offload=modulation"])))
    assert (tabled.draw(**GUIDED).latents - pushed.draw(**GUIDED).latents).abs().max() <= TOLERANCE


@pytest.mark.parametrize("subject", ["sd35_medium"], indirect=True)
def test_blocks_read_from_their_files_may_be_left_out(subject, pushed):
    turned = replace(subject, runner=Runner(compose_config([*subject.overrides(), *LAYERS, "offload=disk"])))
    assert torch.equal(turned.draw(**GUIDED).latents, pushed.draw(**GUIDED).latents)


@pytest.mark.parametrize("subject", ["sd35_medium"], indirect=True)
def test_one_graph_is_without_them(pushed, monkeypatch):
    want = pushed.draw(**GUIDED).latents
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    with uncompiled(pushed):
        for transformer in pushed.runner.built.parts.experts:
            CompileFull().apply(transformer)
        assert (pushed.draw(**GUIDED).latents - want).abs().max() <= TOLERANCE


@pytest.mark.parametrize("subject", ["sd35_medium"], indirect=True)
@pytest.mark.parametrize("layout", ["cfg_degree", "hsdp_degree"])
def test_ranks_make_the_third_prediction_too(subject, pushed, layout, pool):
    fields = {**GUIDED, "height": 3 * subject.multiple, "width": 5 * subject.multiple, "num_inference_steps": 3}
    want = pushed.draw(**fields).latents.numpy()
    for latents in pool(2, draw_pushed, subject.name, subject.folder, {layout: 2}, fields):
        assert np.abs(latents - want).max() <= LATENTS


def draw_pushed(name, folder, chosen, fields):
    """Run on a rank: return latents drawn with skip-layer guidance."""
    runner = Runner(parallel_runs.config(name, folder, chosen, *LAYERS))
    return runner.draw(
        make_state({**runner.config["sampling"], **fields}), Timings(torch.device("cpu"))
    ).latents.numpy()
