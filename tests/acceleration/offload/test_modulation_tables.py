"""Modulation tables: the plain run's results without the weights, on every model whose blocks have them."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from hydrarun.acceleration.offload.modulation_tables import ModulationTables
from hydrarun.config.checks.values import find_cfg_scale, get_unguided_scale
from hydrarun.config.compose import compose_config
from hydrarun.core.errors import RunError
from hydrarun.engine.runner import Runner
from hydrarun.models.flux import FluxTransformer
from hydrarun.models.layers.norm import Modulation
from hydrarun.models.qwen_image import QwenImageTransformer
from tests.helpers import tiny
from tests.helpers.caches import node
from tests.helpers.parallel_runs import draw_tabled
from tests.helpers.subjects import CONFIGS, FAMILIES, LONG, MODELS, SHORT, SORTS, VARIANTS

#: a matrix product of many rows sums in another order than a product of few
CLOSE = 1e-5
STEPS = 3
HAVE = [name for name in MODELS if "modulation" in CONFIGS[name]["model"]["facts"]]
WITH = [name for name in HAVE if name not in VARIANTS]
SOME = [name for name in WITH if name in SORTS]


@pytest.fixture(scope="module")
def tabled_runners():
    return {}


@pytest.fixture
def tabled(subject, tabled_runners):
    """The subject with `offload=modulation`; its tables are those of the last request."""
    if subject.name not in tabled_runners:
        runner = Runner(compose_config([*subject.overrides(), "offload=modulation"]))
        runner.built.parts.pipeline.vae.encode = subject.runner.built.parts.pipeline.vae.encode
        tabled_runners[subject.name] = replace(subject, runner=runner)
    return tabled_runners[subject.name]


def transformer(subject):
    return subject.runner.built.parts.experts.transformers["transformer"]


def tables(tabled) -> ModulationTables:
    return tabled.runner.built.parts.tables["transformer"]


def rows(tabled) -> int:
    """Return the number of rows of the last request's tables, which all have equally many."""
    (count,) = {len(place.table.table) for place in tables(tabled).places}
    return count


def asked(subject, **fields) -> dict:
    """Two prompts of unequal length, guided; small."""
    both = {"prompt": [SHORT, LONG], "negative_prompt": ["x", LONG], "seed": [3, 4], "num_inference_steps": STEPS}
    return {**both, "size": (3, 4), find_cfg_scale(CONFIGS[subject.name])[0]: 3.0, **fields}


def unguided(subject) -> dict[str, float]:
    config = CONFIGS[subject.name]
    return {find_cfg_scale(config)[0]: get_unguided_scale(config)}


def same(subject, tabled, **fields) -> None:
    want, found = (one.draw(**asked(subject, **fields)).latents for one in (subject, tabled))
    assert want.abs().max() > 0.1
    assert (found - want).abs().max() <= CLOSE


def size(module: torch.nn.Module) -> int:
    """Return the bytes of the module's parameters and buffers."""
    return sum(x.nbytes for x in (*module.parameters(), *module.buffers()))


def modulations(module: torch.nn.Module) -> list[Modulation]:
    return [child for child in module.modules() if isinstance(child, Modulation)]


@pytest.mark.sample(1)
@pytest.mark.parametrize("subject", SOME, indirect=True)
def test_latents_equal_the_plain_run_in_request_after_request(subject, tabled):
    """Guided; one prompt without guidance; more steps."""
    same(subject, tabled)
    same(subject, tabled, prompt=LONG, negative_prompt=None, seed=5, **unguided(subject))
    same(subject, tabled, num_inference_steps=STEPS + 1)


@pytest.mark.parametrize("subject", ["flux_dev"], indirect=True)
def test_the_embedded_guidance_and_the_pooled_prompt_are_in_the_tables(subject, tabled):
    """Both change the modulation, and the requests differ in nothing else."""
    fields = asked(subject, prompt="a", seed=1, negative_prompt="x")
    first = tabled.draw(**fields).latents
    same(subject, tabled, prompt="a", seed=1, negative_prompt="x", guidance_scale=7.0)
    assert (tabled.draw(**fields, guidance_scale=7.0).latents - first).abs().max() > 100 * CLOSE
    made = tables(tabled).made_of
    tabled.draw(**{**fields, "prompt": "b", "guidance_scale": 7.0})
    assert not torch.equal(tables(tabled).made_of, made)


@pytest.mark.parametrize("subject", SOME, indirect=True)
def test_caches_skip_the_same_steps_with_the_same_numbers(subject, tabled):
    """Caches call the blocks themselves, and Cache-DiT does not use our loop over them."""
    dbcache = {
        "_target_": "hydrarun.acceleration.cache.cache_dit.CacheDiT",
        "max_warmup_steps": 2,
        "residual_diff_threshold": 5.0,
    }
    for cache in (node("every_n"), node("teacache", threshold=5.0), dbcache):
        same(subject, tabled, cache=cache, num_inference_steps=6, prompt="a", seed=1, negative_prompt="x")
        plain, found = (one.runner.built.parts.cache.record() for one in (subject, tabled))
        assert 0 < found["blocks"]["run"] < found["blocks"]["all"]
        assert found["steps"] == plain["steps"]


@pytest.mark.sample(1)
@pytest.mark.parametrize("subject", ["flux_dev", "qwen_image_edit_plus"], indirect=True)
def test_compiled_blocks_read_the_tables_of_each_request(subject):
    """One graph per block class; tables of another length at another address do not break it."""
    tabled = replace(subject, runner=Runner(compose_config([*subject.overrides(), "offload=modulation"])))
    tabled.runner.built.parts.pipeline.vae.encode = subject.runner.built.parts.pipeline.vae.encode
    for block in transformer(tabled).all_blocks():
        block.compile(fullgraph=True, backend="eager", dynamic=False)
    for steps in (2, 3):
        same(subject, tabled, num_inference_steps=steps, prompt="a", seed=1, negative_prompt="x")
    same(subject, tabled, num_inference_steps=3, prompt="b", seed=1, negative_prompt="x")


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    "layout", ["cfg_degree", "ulysses_degree", "tensor_degree", "hsdp_degree", "data_degree"], ids=lambda name: name
)
@pytest.mark.parametrize("subject", ["flux_dev"], indirect=True)
def test_ranks_draw_the_plain_pictures(subject, pool, layout):
    """Every rank makes its own tables; with data parallelism, of its own pictures."""
    fields = asked(subject)
    high, wide = fields.pop("size")
    fields |= {"height": high * subject.multiple, "width": wide * subject.multiple}
    want = subject.draw(**fields).latents.numpy()
    results = pool(2, draw_tabled, subject.name, subject.folder, {layout: 2}, 0, fields)
    for rank, (latents, count) in enumerate(results):
        own = want[rank : rank + 1] if layout == "data_degree" else want
        assert np.abs(latents - own).max() <= CLOSE
        texts = [{SHORT, "x"}, {LONG}][rank] if layout == "data_degree" else {SHORT, LONG, "x"}
        assert count == len(texts) * STEPS


@pytest.mark.parametrize("subject", SOME, indirect=True)
def test_the_weights_are_nowhere(subject, tabled):
    """The transformer's bytes are the plain one's, minus the modulation weights, plus the tables."""
    tabled.draw(**asked(subject))
    gone = [p for module in modulations(transformer(subject)) for p in module.parameters()]
    dim = transformer(subject).proj_out.in_features
    assert sum(p.nbytes for p in gone) == sum(
        4 * m.parts * (m.linear.in_features * dim + dim) for m in modulations(transformer(subject))
    )
    table_bytes = sum(4 * m.parts * dim * rows(tabled) for m in modulations(transformer(subject)))
    weight_bytes = sum(p.nbytes for p in gone)
    assert size(transformer(tabled)) == size(transformer(subject)) - weight_bytes + table_bytes
    assert not modulations(transformer(tabled))
    waiting = [p for place in tables(tabled).places for p in place.modulation.parameters()]
    assert len(waiting) == len(gone)
    assert all(p.is_meta for p in waiting)
    assert tables(tabled).count_bytes() == (table_bytes, weight_bytes)


#: for two guided prompts: rows per step, and rows shared by all steps
ROWS = {
    "demo": (1, 0),
    "qwen_image": (1, 0),
    "qwen_image_edit": (1, 0),
    "qwen_image_edit_plus": (1, 1),  # the images to edit are at timestep 0 in every step
    "zimage": (1, 0),
    "qwen_image_layered": (1, 0),
    "flux_dev": (3, 0),  # one per distinct prompt; one text is both prompt and negative prompt
    "sd35_medium": (3, 0),
    "longcat_image": (1, 0),
    "longcat_image_edit": (1, 0),
    "ovis_image": (1, 0),
    "glm_image": (1, 0),
}


@pytest.mark.sample(3)
@pytest.mark.parametrize("subject", WITH, indirect=True)
def test_what_is_conditioned_equally_shares_a_row(subject, tabled):
    each, once = ROWS[subject.name]
    tabled.draw(**asked(subject))
    assert rows(tabled) == each * STEPS + once
    tabled.draw(**asked(subject, prompt=SHORT, negative_prompt=SHORT, seed=[1, 2, 3]))
    assert rows(tabled) == STEPS + once


@pytest.mark.parametrize("subject", ["qwen_image", "flux_dev"], indirect=True)
def test_tables_are_made_when_timesteps_or_conditioning_change(subject, tabled, monkeypatch):
    made = []
    make = ModulationTables.compute_table
    monkeypatch.setattr(ModulationTables, "compute_table", lambda *given: made.append(1) or make(*given))
    every = len(tables(tabled).places)
    for fields, new in (
        ({"num_inference_steps": 2}, every),
        ({"num_inference_steps": 2, "seed": [8, 9], "true_cfg_scale": 2.0}, 0),
        ({"num_inference_steps": 2, "prompt": ["y", LONG]}, 0 if subject.name == "qwen_image" else every),
        ({"num_inference_steps": 3, "prompt": ["y", LONG]}, every),
    ):
        made.clear()
        tabled.draw(**asked(subject, **fields))
        assert len(made) == new, fields


@pytest.mark.parametrize("subject", ["qwen_image"], indirect=True)
def test_one_layers_weights_at_a_time(subject, tabled, monkeypatch):
    """While a table is made, only its own modulation has weights."""
    held = []
    values = Modulation.values

    def counting(self, temb):
        held.append(sum(not p.is_meta for place in tables(tabled).places for p in place.modulation.parameters()))
        return values(self, temb)

    monkeypatch.setattr(Modulation, "values", counting)
    tabled.draw(**asked(subject, num_inference_steps=5))
    assert held == [2] * len(tables(tabled).places)


@pytest.mark.parametrize("subject", ["demo"], indirect=True)
def test_bytes_are_told(subject, tabled, monkeypatch):
    told = []
    monkeypatch.setattr(tables(tabled).progress, "note", told.append)
    tabled.draw(**asked(subject, num_inference_steps=5))
    parts, dim = 6 * 12 + 2, 128  # 6 blocks, and the head
    assert f"{4 * parts * dim * 5 / 2**20:.1f}, {4 * parts * (dim * dim + dim) / 2**20:.1f}" == "0.2, 4.7"
    assert "modulation tables: 0.2 MiB instead of 4.7 MiB of weights" in told


def test_in_half_precision_the_difference_is_its_rounding(tiny_folder):
    plain, found = (
        tiny.draw(tiny.runner(tiny_folder, "dtype=bfloat16", f"offload={offload}"), true_cfg_scale=3.0).latents.float()
        for offload in ("none", "modulation")
    )
    assert (found - plain).norm() / plain.norm() < 2e-2


def test_weights_that_are_gone_are_named_and_tables_made_in_halves_are_not_used(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "copy")
    runner = tiny.runner(folder, "offload=modulation")
    want = tiny.draw(runner).latents
    file = next((folder / "transformer").glob("*.safetensors"))
    hidden = file.rename(file.with_suffix(".hidden"))
    with pytest.raises(RunError, match=re.escape(str(file))):
        tiny.draw(runner, num_inference_steps=5)
    hidden.rename(file)
    assert torch.equal(tiny.draw(runner).latents, want)


@pytest.mark.parametrize(
    ("cls", "name"), [(QwenImageTransformer, "qwen_image"), (FluxTransformer, "flux_dev")], ids=["qwen_image", "flux"]
)
def test_published_sizes(cls, name):
    """The classes' defaults are the published sizes; `facts.modulation` is the number of modulation parameters."""
    with torch.device("meta"):
        whole = cls(guidance_embeds=True) if cls is FluxTransformer else cls()
    gone = sum(p.numel() for module in modulations(whole) for p in module.parameters())
    facts = CONFIGS[name]["model"]["facts"]
    assert f"{gone / 1e9:.1f}B" == facts["modulation"]
    assert f"{sum(p.numel() for p in whole.parameters()) / 1e9:.1f}B" == facts["parameters"]


@pytest.mark.parametrize("subject", ["demo"], indirect=True)
def test_the_shipped_models_size(subject):
    gone = sum(p.numel() for module in modulations(transformer(subject)) for p in module.parameters())
    assert f"{gone / 1e6:.1f}M" == CONFIGS["demo"]["model"]["facts"]["modulation"]


@pytest.mark.parametrize("subject", FAMILIES, indirect=True)
def test_the_options_say_whose_blocks_have_such_weights(subject):
    has = any(modulations(block) for block in transformer(subject).all_blocks())
    assert has == (subject.name in HAVE)
