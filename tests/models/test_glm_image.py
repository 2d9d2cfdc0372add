"""GLM-Image: details that the parity tests of whole runs do not cover, such as image prefixes and prior tokens."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache
from PIL import Image

from hydrarun.acceleration.cache.base import NoCache
from hydrarun.acceleration.compilation import raise_graph_limit
from hydrarun.acceleration.parallel.data import broadcast_ids
from hydrarun.config.compose import compose_config
from hydrarun.core.distributed.degrees import world_size
from hydrarun.core.distributed.mesh import Mesh
from hydrarun.core.errors import RunError, UsageError
from hydrarun.engine.plan.dry_forward import count_unrun_bytes
from hydrarun.engine.runner import Runner
from hydrarun.models.glm_image import GlmImageTransformer
from hydrarun.models.transformer import Inputs, Step
from hydrarun.pipeline.request import make_state
from hydrarun.pipeline.stages.glm_image import draw_prior_tokens, fit_image
from tests.helpers import checkpoints_prior, parallel_runs, tiny
from tests.helpers.caches import node
from tests.helpers.subjects import LONG, SHORT, pictures

TOLERANCE = 1e-5  # float32, the same operations in another order
LATENTS, PIXELS = 1e-4, 1  # of whole runs
IMAGES = 2
GUIDED: dict[str, Any] = {"prompt": [SHORT, LONG], "seed": [3, 4], "guidance_scale": 3.0, "size": (2, 3)}
DBCACHE = {
    "_target_": "hydrarun.acceleration.cache.cache_dit.CacheDiT",
    "max_warmup_steps": 2,
    "residual_diff_threshold": 5.0,
}
only = pytest.mark.parametrize("subject", ["glm_image"], indirect=True)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """diffusers' transformer, and ours loaded from the files it saved."""
    reference = checkpoints_prior.glm_image().transformer
    folder = tmp_path_factory.mktemp("transformer")
    reference.save_pretrained(folder)
    return reference, tiny.load_transformer(GlmImageTransformer, folder)


@pytest.fixture(scope="module")
def edited():
    """Final state of the plain edit run, cached by subject; all methods are compared with it."""
    states = {}

    def draw(subject):
        return states.setdefault(subject.name, subject.draw(IMAGES, **GUIDED))

    return draw


def given(rows: int, columns: int, conditional: bool = True) -> dict[str, Any]:
    """Return one branch's inputs, for two pictures of `rows` x `columns` tokens with two input images."""
    generator = torch.Generator().manual_seed(0)
    grids = ((1, 2, 4), (1, 4, 2))
    return {
        "encoder_hidden_states": torch.randn(2, 6, 16, generator=generator),
        "encoder_hidden_states_mask": None,
        "told": torch.full([2], float(conditional)),
        "grid": (1, rows, columns),
        "height": 16 * rows,
        "width": 16 * columns,
        "prior_tokens": torch.randint(0, 128, (2, rows * columns), generator=generator),
        "image_latents": torch.randn(1, 16, 16, generator=generator).expand(2, -1, -1),
        "image_grids": grids,
        "image_prior_tokens": torch.randint(0, 128, (1, 16), generator=generator).expand(2, -1),
    }


def reference_call(model, latents, timestep, branch, caches=None, of_image: int | None = None):
    """Run diffusers' transformer on the same inputs: on the picture, or on one of the input images alone."""
    fields = branch
    if of_image is not None:
        start, grid = 8 * of_image, branch["image_grids"][of_image]
        packed = branch["image_latents"][:1, start : start + 8]
        latents = packed.unflatten(1, grid[1:]).unflatten(3, (4, 2, 2)).permute(0, 3, 1, 4, 2, 5)
        latents = latents.flatten(4, 5).flatten(2, 3)
        fields = {
            "encoder_hidden_states": branch["encoder_hidden_states"][:1, :0],
            "prior_tokens": branch["image_prior_tokens"][0, start : start + 8],
            "told": torch.ones(1),
            "height": 16 * grid[1],
            "width": 16 * grid[2],
        }
    size = torch.tensor([[fields["height"], fields["width"]]] * len(latents))
    return model(
        latents,
        fields["encoder_hidden_states"],
        fields["prior_tokens"],
        torch.full_like(fields["prior_tokens"], not fields["told"].all(), dtype=torch.bool),
        timestep,
        size,
        torch.zeros_like(size),
        kv_caches=caches,
        return_dict=False,
    )[0]


def predict(transformer, latents, timestep, name, branch):
    return transformer(Inputs(latents, timestep, {name: branch}), Step(), NoCache())[name]


@pytest.mark.parametrize(("rows", "columns"), [(2, 2), (4, 6)])
@pytest.mark.parametrize("conditional", [True, False])
@torch.no_grad()
def test_one_call_after_input_images(pair, rows, columns, conditional):
    """Compares the prediction, with the prefix of the images, and the input of the first block's attention."""
    reference, ours = pair
    branch = given(rows, columns, conditional)
    latents = torch.randn(2, 4, 2 * rows, 2 * columns, generator=torch.Generator().manual_seed(1))
    timestep = torch.tensor([713.0, 713.0])
    caches = GlmImageKVCache(3)
    caches.set_mode("write")
    for image in range(2):
        reference_call(reference, None, torch.zeros(1), branch, caches, of_image=image)
    caches.next_sample()
    caches.set_mode("read" if conditional else "skip")
    seen = []
    hook = reference.transformer_blocks[0].attn1.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True
    )
    want = reference_call(reference, latents, timestep - 1, branch, caches)
    hook.remove()
    assert want.std() > 0.1
    name = "positive" if conditional else "negative"
    found = predict(ours, latents.unsqueeze(2), timestep, name, branch)
    assert (found.squeeze(2) - want).abs().max() <= TOLERANCE
    assert (ours.gate_signal(ours.embed(latents.unsqueeze(2), timestep, **branch)) - seen[0]).abs().max() <= TOLERANCE
    alone = {**branch, "image_latents": None, "image_grids": ()}
    without = predict(ours, latents.unsqueeze(2), timestep, name, alone)
    assert ((without - found).abs().max() > 100 * TOLERANCE) == conditional


@torch.no_grad()
def test_the_prefix_is_made_once_and_goes_with_the_images(pair):
    _, ours = pair
    calls = []
    hook = ours.blocks[1].register_forward_pre_hook(lambda module, args: calls.append(args[0].shape[1]))
    branch = given(2, 2)
    for value in (700.0, 600.0):
        for name in ("positive", "negative"):
            predict(ours, torch.zeros(2, 4, 1, 4, 4), torch.tensor([value] * 2), name, branch)
    hook.remove()
    assert calls == [8, 8, 4, 4, 4, 4]
    assert len(ours.prefixes) == 1
    del branch
    assert len(ours.prefixes) == 0


@only
@pytest.mark.parametrize("count", [0, 2])
def test_prior_tokens_are_the_references(subject, count, monkeypatch):
    """With an item's own seed, tokens equal diffusers'. The global random generators are not changed."""
    prior = type(subject.pipeline.vision_language_encoder)
    monkeypatch.setattr(prior, "generate", prior.generate.__wrapped__)
    parts = subject.runner.built.parts
    fields = {**subject.runner.config["sampling"], "prompt": LONG, "height": 64, "width": 96, "seed": 11}
    state = make_state(fields, [one.resize((96, 64)) for one in pictures(count)])
    before = torch.get_rng_state()
    tokens, of_images = draw_prior_tokens(LONG, 11, state, parts)
    assert torch.equal(torch.get_rng_state(), before)
    reference = checkpoints_prior.with_images_as_expected(subject.pipeline)
    images = [state.input_images] if count else None
    wanted, of_each, _ = reference.generate_prior_tokens(
        LONG, 64, 96, images, generator=torch.Generator().manual_seed(11)
    )
    assert tokens.shape == (1, 24)
    assert torch.equal(tokens, wanted)
    assert of_images is None if of_each is None else torch.equal(of_images[0], of_each[0])


@only
def test_the_prior_draws_as_its_own_file_says(subject):
    loaded = subject.runner.built.parts.pipeline.vision_language_encoder.generation_config
    assert (loaded.temperature, loaded.top_p, loaded.top_k) == (0.9, 0.8, 0)


@only
def test_a_prior_that_ends_early_is_told_of(subject, monkeypatch):
    prior = subject.runner.built.parts.pipeline.vision_language_encoder
    monkeypatch.setattr(prior, "generate", lambda input_ids, **_: input_ids)
    with pytest.raises(RunError, match=r"drew 0 of the picture's 6 tokens and ended there, with seed 3 for the prompt"):
        subject.draw(size=(2, 3), seed=3)


@only
def test_what_the_prior_does_not_take_is_refused(subject):
    with pytest.raises(UsageError, match=r"input\.images: the prior model does not take a picture of 500 x 100 pixels"):
        tiny.draw(subject.runner, [Image.new("RGB", (500, 100))])
    with pytest.raises(UsageError, match=r"holds <\|image\|>, which stands for an input image"):
        subject.draw(prompt="a <|image|>")
    with pytest.raises(UsageError, match=r"sampling.height=80: this checkpoint needs a multiple of 32"):
        subject.draw(height=80, width=64)


@only
def test_input_images_set_the_size_and_are_fitted(subject):
    """Sizes fit the tokens of both prior and VAE. The first image's size is the picture's."""
    state = subject.draw(2, height=None, width=None)
    assert [one.size for one in state.input_images] == [(96, 64), (64, 96)]
    assert (state.height, state.width) == (64, 96)
    assert state.image_grids == ((1, 4, 6), (1, 6, 4))
    plain = make_state({**subject.runner.config["sampling"], "height": None, "width": 96})
    subject.runner.built.stages[0](plain, subject.runner.built.parts, None)
    assert (plain.height, plain.width) == (1024, 96)
    odd = replace(plain, input_images=[Image.new("RGB", (27, 35))])
    subject.runner.built.stages[0](odd, subject.runner.built.parts, None)
    assert odd.input_images[0].size == fit_image(odd.input_images[0], subject.runner.built.parts).size


@only
def test_the_schedule_is_the_references(subject):
    """Timesteps are integers, and noise levels are shifted by the size."""
    state = subject.draw(size=(2, 3), num_inference_steps=7)
    scheduler = subject.runner.built.parts.pipeline.scheduler
    assert state.timesteps.tolist() == [1000, 857, 714, 571, 429, 286, 143]
    mu = 0.75 * (24 / 256) ** 0.5 + 0.25
    wanted = [mu / (mu + 1000 / time - 1) for time in state.timesteps.tolist()]
    assert np.abs(np.array(wanted) - scheduler.sigmas[:-1].numpy()).max() < 1e-6


LAYOUTS: dict[str, dict[str, int]] = {
    "ulysses2": {"ulysses_degree": 2},
    "ring2": {"ring_degree": 2},
    "tp2": {"tensor_degree": 2},
    "cfg2_hsdp2": {"cfg_degree": 2, "hsdp_degree": 2},
    "data2": {"data_degree": 2},
    "ulysses4": {"ulysses_degree": 4},
    "usp2x2": {"ring_degree": 2, "ulysses_degree": 2},
    "tp2_ring2": {"tensor_degree": 2, "ring_degree": 2},
}


@pytest.mark.sample(3)
@only
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_prefix_is_shared_by_ranks(subject, layout, pool, edited):
    """Each rank has a shard of heads, tokens, branches or weights. With more ranks than heads, some have no heads."""
    state, chosen = edited(subject), LAYOUTS[layout]
    fields = {name: value for name, value in GUIDED.items() if name != "size"}
    fields |= {"height": state.height, "width": state.width}
    ranks = world_size(parallel_runs.degrees(**chosen))
    results = pool(ranks, parallel_runs.draw, subject.name, subject.folder, chosen, IMAGES, fields)
    data = chosen.get("data_degree", 1)
    for rank, (frames, latents, _) in enumerate(results):
        share = rank // (ranks // data)
        own = state.latents.numpy()[share : share + 1] if data > 1 else state.latents.numpy()
        assert np.abs(latents - own).max() <= LATENTS
        assert np.abs(frames.astype(int) - state.frames.astype(int)).max() <= PIXELS


@only
def test_shared_encoders_of_unequal_batches_are_refused(subject):
    """Prompts are encoded one at a time: ranks would wait forever for a rank that has fewer prompts."""
    with pytest.raises(UsageError, match=r"parallel\.hsdp_degree"):
        compose_config(
            [*subject.overrides(), "sampling.seed=[1,2]", "parallel.hsdp_degree=2", "parallel.data_degree=2"]
        )


@only
@pytest.mark.parametrize("cache", [node("every_n"), node("first_block", threshold=5.0), DBCACHE], ids=["n", "fb", "db"])
def test_caches_skip_steps_of_an_edit(subject, edited, cache):
    """The cache skips blocks; the blocks that run still attend to the prefix."""
    fields = {**GUIDED, "num_inference_steps": 6}
    skipped = subject.draw(IMAGES, cache=cache, **fields).latents
    record = subject.runner.built.parts.cache.record()
    assert 0 < record["blocks"]["run"] < record["blocks"]["all"]
    want = subject.draw(IMAGES, **fields).latents
    assert LATENTS < (skipped - want).abs().max() < want.abs().max()


@only
@pytest.mark.parametrize("option", ["modulation", "disk", "quantized"])
def test_weights_that_are_held_otherwise(subject, edited, option):
    """Modulation tables also have rows for the input images, which are the same in all steps."""
    chosen = "quantization=int8_weight_only" if option == "quantized" else f"offload={option}"
    runner = Runner(compose_config([*subject.overrides(), chosen]))
    found = replace(subject, runner=runner).draw(IMAGES, **GUIDED).latents
    difference = (found - edited(subject).latents).abs().max()
    if option == "quantized":
        assert LATENTS < difference < 1.0
    else:
        assert difference <= TOLERANCE
    if option == "modulation":
        assert len(runner.built.parts.tables["transformer"].made_of) == 4 + IMAGES


@pytest.mark.sample(1)
@only
@pytest.mark.parametrize("whole", [False, True], ids=["blocks", "full"])
def test_compiled_edits(subject, edited, whole):
    """Compiles each block, or a branch's whole forward pass, as one graph."""
    torch._dynamo.reset()
    raise_graph_limit()  # with a prefix, each block is a separate graph: the block's index is a constant in it
    compiled = replace(subject, runner=Runner(compose_config(subject.overrides())))
    transformer = compiled.runner.built.parts.experts["transformer"]
    if whole:
        for piece in ("forward_branch", "prepare", "run_blocks", "finish_branch"):
            traced = torch.compile(getattr(transformer, piece), fullgraph=True, backend="eager", dynamic=False)
            setattr(transformer, piece, traced)
    else:
        for block in transformer.all_blocks():
            block.compile(fullgraph=True, backend="eager", dynamic=False)
    assert (compiled.draw(IMAGES, **GUIDED).latents - edited(subject).latents).abs().max() <= TOLERANCE
    again = compiled.draw(1, **GUIDED).latents
    assert (again - subject.draw(1, **GUIDED).latents).abs().max() <= TOLERANCE


@pytest.mark.parametrize("degree", ["cfg_degree", "ulysses_degree", "tensor_degree", "data_degree"])
def test_ranks_take_the_first_ones_tokens(pool, degree):
    """Applies to ranks that draw the same pictures: sampled tokens could differ between them."""
    found = pool(2, tokens_of_ranks, {degree: 2})
    assert found == ([[10, 20], [11, 21]] if degree == "data_degree" else [[10, 20], [10, 20]])


def tokens_of_ranks(chosen):
    """Run on a rank: broadcast tokens that differ between ranks and return the result."""
    mesh = Mesh(parallel_runs.degrees(**chosen), parallel_runs.CPU)
    return broadcast_ids(torch.tensor([10, 20]) + mesh.rank, mesh).tolist()


def test_a_plan_counts_the_prefix_of_all_blocks(pair):
    """A dry forward runs two of the blocks."""
    _, ours = pair
    branch = given(2, 2)
    with torch.no_grad():
        predict(ours, torch.zeros(2, 4, 1, 4, 4), torch.tensor([700.0] * 2), "positive", branch)
    assert ours.kept_bytes() == 3 * 2 * 16 * 48 * 4
    assert count_unrun_bytes(ours) == 0
    deeper = SimpleNamespace(config={"num_layers": 30}, depth=2, kept_bytes=lambda: 100)
    assert count_unrun_bytes(deeper) == 1400


@only
def test_a_size_is_refused_before_weights_are_read(subject):
    with pytest.raises(UsageError, match=r"sampling.width=48: this checkpoint needs a multiple of 32"):
        Runner(compose_config([*subject.overrides(), "sampling.width=48"]))
