"""Z-Image: details that the parity tests of whole runs do not cover."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hydrarun.config.checks.compatibility import check_compatibility
from hydrarun.config.compose import compose_config
from hydrarun.core.errors import UsageError
from hydrarun.engine.runner import Runner
from hydrarun.models.zimage import ZImageTransformer
from hydrarun.pipeline.stages.encode import pad_to_longest
from tests.helpers import checkpoint_zimage, parallel_runs, tiny
from tests.helpers.subjects import CONFIGS, LONG, SHORT

TOLERANCE = 1e-5  # float32, the same operations in another order
LATENTS = 1e-4  # of a whole run


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """diffusers' transformer, and ours loaded from the files it saved."""
    reference = checkpoint_zimage.transformer()
    folder = tmp_path_factory.mktemp("transformer")
    reference.save_pretrained(folder)
    return reference, tiny.load_transformer(ZImageTransformer, folder)


def inputs(grid: tuple[int, int], lengths: list[int]) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """Return latents for a token grid, captions of the given lengths, and timesteps."""
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(len(lengths), 4, 1, 2 * grid[0], 2 * grid[1], generator=generator)
    captions = [torch.randn(length, 16, generator=generator) for length in lengths]
    return latents, captions, torch.full([len(lengths)], 713.0)


def conditioning(captions: list[torch.Tensor], garbage: float = 0.0) -> dict[str, torch.Tensor | None]:
    """Return conditioning as our stage does, with `garbage` in padded positions."""
    lengths = torch.tensor([len(one) for one in captions])
    text = torch.nn.utils.rnn.pad_sequence(captions, batch_first=True, padding_value=garbage)
    mask = torch.arange(text.shape[1]) < lengths[:, None]
    return {"encoder_hidden_states": text, "encoder_hidden_states_mask": None if mask.all() else mask}


def run_reference(model, latents, captions, timesteps) -> torch.Tensor:
    """Run the reference, which has the opposite sign (the direction to the picture) and the time 0 at the noise."""
    items = model(list(latents.unbind()), (1000 - timesteps) / 1000, list(captions), return_dict=False)[0]
    return -torch.stack(items)


@pytest.mark.parametrize(
    ("grid", "lengths"),
    [((4, 8), [32]), ((3, 5), [7]), ((5, 7), [40, 13]), ((5, 7), [31, 5]), ((2, 3), [33, 64, 1])],
    ids=["nothing to pad", "both padded", "unequal multiples", "unequal in one multiple", "three"],
)
@torch.no_grad()
def test_equals_diffusers(pair, grid, lengths):
    """An item's positions and padding depend on its own caption's length, not on other items in the batch."""
    reference, ours = pair
    latents, captions, timesteps = inputs(grid, lengths)
    want = run_reference(reference, latents, captions, timesteps)
    have = tiny.predict(ours, latents, timesteps, conditioning(captions))
    assert want.std() > 0.1
    assert (have - want).abs().max() <= TOLERANCE
    garbage = tiny.predict(ours, latents, timesteps, conditioning(captions, garbage=1e3))
    assert torch.equal(have, garbage)


@torch.no_grad()
def test_gate_signal_is_the_first_refiners_modulated_input(pair):
    """The gate signal is the input of the first block over the picture."""
    reference, ours = pair
    latents, captions, timesteps = inputs((5, 7), [40, 13])
    seen = []
    hook = reference.noise_refiner[0].attention.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    run_reference(reference, latents, captions, timesteps)
    hook.remove()
    signal = ours.gate_signal(ours.embed(latents, timesteps, **conditioning(captions)))
    assert (signal - seen[0]).abs().max() <= TOLERANCE


@torch.no_grad()
def test_declared_token_dimensions_are_token_dimensions(pair):
    _, ours = pair
    latents, captions, timesteps = inputs((5, 7), [40, 13])
    given = conditioning(captions)
    tokens = replace(ours.embed(latents, timesteps, **given), **ours.positions(latents, **given))
    lengths = {"hidden_states": 64, "encoder_hidden_states": 64}
    for name, (dim, stream) in tokens.token_dims().items():
        if name != "temb_index":
            assert getattr(tokens, name).shape[dim] == lengths[stream], name
    assert tokens.encoder_mask.sum(1).tolist() == [64, 32]


def test_a_bfloat16_model_predicts_in_float32(tmp_path):
    """Guidance and scheduler then compute in float32, as in the reference; the scheduler keeps its input's dtype."""
    checkpoint_zimage.transformer().save_pretrained(tmp_path)
    half = tiny.load_transformer(ZImageTransformer, tmp_path, torch.bfloat16)
    latents, captions, timesteps = inputs((3, 5), [7])
    with torch.no_grad():
        have = tiny.predict(half, latents.bfloat16(), timesteps, conditioning([one.bfloat16() for one in captions]))
    assert have.dtype == torch.float32


def test_other_members_of_the_family_are_refused_by_name():
    for settings, said in (
        ({"siglip_feat_dim": 1152}, r"siglip_feat_dim=1152 \(not None\)"),
        ({"n_kv_heads": 10}, r"n_kv_heads=10 \(not 30\)"),
        ({"all_patch_size": (2, 4)}, r"all_patch_size=\[2, 4\] \(not \[2\]\)"),
        ({"qk_norm": False}, r"qk_norm=False \(not True\)"),
    ):
        with pytest.raises(UsageError, match=said), torch.device("meta"):
            ZImageTransformer(n_layers=1, **settings)


def test_published_size():
    """The defaults give the published model: 6.15 billion parameters, 0.13 of them in modulation."""
    with torch.device("meta"):
        model = ZImageTransformer()
    total = sum(p.numel() for p in model.parameters())
    modulation = sum(p.numel() for name, p in model.named_parameters() if "modulation." in name)
    assert total == pytest.approx(6.15e9, rel=1e-3)
    assert modulation == 32 * 257 * 4 * 3840 + 257 * 3840


def settled(subject, *guidance: str) -> Runner:
    """Return a runner of the subject with these guidance settings."""
    return Runner(compose_config([*subject.overrides(), *(f"model.guidance.{one}" for one in guidance)]))


FIELDS = {"prompt": [SHORT, LONG], "negative_prompt": "x", "seed": [3, 4], "num_inference_steps": 6}


def reference(pipeline, state, **settings) -> torch.Tensor:
    """Return diffusers' final latents for our request, as one batch, with additional arguments."""
    return pipeline(
        prompt=list(state.prompts),  # the pipeline edits the list
        negative_prompt=list(state.negative_prompts),
        generator=[torch.Generator().manual_seed(seed) for seed in state.seeds],
        height=state.height,
        width=state.width,
        num_inference_steps=state.num_inference_steps,
        guidance_scale=state.guidance_scale,
        output_type="latent",
        **settings,
    )[0].unsqueeze(2)


@pytest.mark.parametrize("subject", ["zimage"], indirect=True)
@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_the_cap_on_the_norm_and_the_end_of_guidance_are_the_references(subject, scale):
    """Tests them alone and together, also for scale 0.5 (1.5 if counted from 1). Each changes the latents."""
    plain = subject.draw(**FIELDS, guidance_scale=scale).latents
    for settings in (
        {"cfg_normalization": 1.0},
        {"cfg_truncation": 0.3},
        {"cfg_normalization": 1.01, "cfg_truncation": 0.5},
    ):
        runner = settled(subject, *(f"{name}={value}" for name, value in settings.items()))
        state = tiny.draw(runner, height=32, width=32, **FIELDS, guidance_scale=scale)
        assert (state.latents - reference(subject.pipeline, state, **settings)).abs().max() <= LATENTS
        assert (state.latents - plain).abs().max() > 100 * LATENTS, settings


@pytest.mark.parametrize("subject", ["zimage"], indirect=True)
def test_behind_the_end_of_guidance_there_is_one_branch(subject):
    runner = settled(subject, "cfg_truncation=0.3")
    state = tiny.draw(runner, height=32, width=32, **FIELDS, guidance_scale=4.0)
    done = [(1000 - time) / 1000 for time in state.timesteps.tolist()]
    guided = [step for step, share in enumerate(done) if share <= 0.3]
    assert 0 < len(guided) < 6
    steps = runner.built.parts.cache.record()["steps"]["transformer"]
    assert steps["positive"]["computed"] == [*range(6)]
    assert steps["negative"]["computed"] == guided


@pytest.mark.parametrize("subject", ["zimage"], indirect=True)
def test_two_ranks_end_guidance_together(subject, pool):
    """Each rank computes its branch in all steps, so neither waits for the other."""
    state = tiny.draw(settled(subject, "cfg_truncation=0.3"), **small(subject))
    chosen, more = {"cfg_degree": 2}, "model.guidance.cfg_truncation=0.3"
    for latents in pool(2, parallel_runs.draw_with, subject.name, subject.folder, chosen, small(subject), more):
        assert (torch.from_numpy(latents) - state.latents).abs().max() <= LATENTS


def small(subject) -> dict:
    return {**FIELDS, "guidance_scale": 4.0, "height": 32, "width": 32}


@pytest.mark.parametrize("subject", ["zimage"], indirect=True)
def test_encoding_leaves_the_requests_prompts_alone(subject):
    """The reference overwrites the given list with its templates."""
    state = subject.draw(**FIELDS, guidance_scale=4.0)
    assert state.prompts == [SHORT, LONG]
    assert state.negative_prompts == ["x", "x"]


def test_turbo_is_another_checkpoint_with_other_defaults():
    whole, turbo = (CONFIGS[name] for name in ("zimage", "zimage_turbo"))
    same = {key for key in whole["model"] if whole["model"][key] == turbo["model"][key]}
    assert set(whole["model"]) - same == {"name", "path"}
    changed = {
        key: turbo["sampling"][key] for key in whole["sampling"] if whole["sampling"][key] != turbo["sampling"][key]
    }
    assert changed == {"num_inference_steps": 8, "guidance_scale": 0.0}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model=zimage", "sampling.guidance_scale=null"], "sampling.guidance_scale.*: null; 0 turns guidance off"),
        (["model=zimage", "sampling.negative_prompt=null"], "or sampling.guidance_scale=0 for no guidance"),
        (["model=zimage_turbo", "parallel=cfg2"], "parallel.cfg_degree=1, or sampling.guidance_scale=1"),
    ],
)
def test_what_users_are_told_counts_from_zero(words, said):
    with pytest.raises(UsageError, match=said):
        check_compatibility(compose_config([*words, "sampling.prompt=a"]))


def test_captions_of_one_length_need_no_mask():
    """Without a mask, attention kernels that do not support masks can be used."""
    text = [torch.ones(3, 2), torch.ones(3, 2)]
    assert pad_to_longest(text)["encoder_hidden_states_mask"] is None
    found = pad_to_longest([text[0], torch.ones(1, 2)])
    assert found["encoder_hidden_states"].sum((1, 2)).tolist() == [6.0, 2.0]
    assert found["encoder_hidden_states_mask"].tolist() == [[True] * 3, [True, False, False]]
