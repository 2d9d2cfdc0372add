"""Wan: details that the parity tests of whole runs do not cover."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hydrarun.core.errors import UsageError
from hydrarun.models.wan import WanTokens, WanTransformer
from tests.helpers import checkpoints, tiny

TOLERANCE = 1e-5  # float32, the same operations in another order


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("transformer")
    checkpoints.BUILDERS["wan21_t2v_14b"]().transformer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reference():
    """diffusers' transformer, with the weights in `folder`."""
    return checkpoints.BUILDERS["wan21_t2v_14b"]().transformer


@pytest.fixture(scope="module")
def ours(folder):
    return tiny.load_transformer(WanTransformer, folder)


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 16, 3, 6, 10, generator=generator), torch.randn(2, 7, 16, generator=generator)


@torch.no_grad()
def test_one_call_and_its_gate_signal(reference, ours):
    """Compares the prediction and the input of the first block's self-attention."""
    latents, text = inputs()
    timestep = torch.tensor([700.0, 700.0])
    seen = []
    hook = reference.blocks[0].attn1.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    want = reference(latents, timestep, text, return_dict=False)[0]
    hook.remove()
    given = {"encoder_hidden_states": text}
    assert want.std() > 0.1
    assert (tiny.predict(ours, latents, timestep, given) - want).abs().max() <= TOLERANCE
    assert (ours.gate_signal(ours.embed(latents, timestep, **given)) - seen[0]).abs().max() <= TOLERANCE


@torch.no_grad()
def test_a_given_first_frame_is_a_timestep_per_token(reference, ours):
    """The reference embeds a timestep per token. We embed two and index them by token."""
    latents, text = inputs()
    first = torch.randn(2, 16, 1, 6, 10, generator=torch.Generator().manual_seed(1))
    per_token = torch.full((2, 3, 15), 700.0)
    per_token[:, 0] = 0
    mixed = torch.cat([first, latents[:, :, 1:]], dim=2)
    want = reference(mixed, per_token.flatten(1), text, return_dict=False)[0]
    given = {"encoder_hidden_states": text, "first_frame": first}
    tokens = ours.embed(latents, torch.tensor([700.0, 700.0]), **given)
    assert tokens.temb.shape[1] == 2
    assert (tiny.predict(ours, latents, torch.tensor([700.0, 700.0]), given) - want).abs().max() <= TOLERANCE


@torch.no_grad()
def test_declared_token_dimensions_are_token_dimensions(ours):
    latents, text = inputs()
    given = {"encoder_hidden_states": text, "first_frame": latents[:, :, :1]}
    tokens = ours.embed(latents, torch.tensor([700.0, 700.0]), **given)
    tokens = replace(tokens, **ours.positions(latents, **given))
    lengths = {"hidden_states": 45, "encoder_hidden_states": 7}
    absent = {"encoder_rope"}
    for name, (dim, stream) in WanTokens.token_dims().items():
        if name not in absent:
            assert getattr(tokens, name).shape[dim] == lengths[stream], name
    assert tokens.grid == (3, 3, 5)
    assert ours.sharded_streams == ("hidden_states",)  # the text is not sharded


def test_what_the_reference_keeps_in_float32_is_kept(folder, reference):
    half = tiny.load_transformer(WanTransformer, folder, torch.bfloat16)
    kept = {name for name, p in half.named_parameters() if p.dtype == torch.float32}
    theirs = type(reference).from_pretrained(folder, torch_dtype=torch.bfloat16)
    count = sum(p.numel() for p in theirs.parameters() if p.dtype == torch.float32)
    assert count > 0
    assert sum(half.get_parameter(name).numel() for name in kept) == count


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_dim": 1280, "added_kv_proj_dim": 64}, "sets image_dim, added_kv_proj_dim: .*image encoder"),
        ({"qk_norm": "rms_norm"}, "qk_norm=rms_norm"),
        ({"eps": 1e-5}, "eps=1e-05"),
    ],
)
def test_other_members_of_the_family_are_refused_by_name(settings, message):
    with pytest.raises(UsageError, match=message), torch.device("meta"):
        WanTransformer(num_layers=1, **settings)


@pytest.mark.parametrize(
    ("settings", "billions"),
    [
        ({}, 14.29),
        ({"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}, 1.42),
        (
            {"num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30, "in_channels": 48, "out_channels": 48},
            5.0,
        ),
    ],
    ids=["14B", "1.3B", "TI2V-5B"],
)
def test_published_sizes(settings, billions):
    with torch.device("meta"):
        model = WanTransformer(**settings)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(billions * 1e9, rel=5e-3)
