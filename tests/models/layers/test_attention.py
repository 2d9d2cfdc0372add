"""Attention layer and backends against the definition, softmax(q k / sqrt(d)) v, in float64."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

from hydrarun.core.errors import UsageError
from hydrarun.models.layers.attention import Attention, CrossAttention
from hydrarun.models.layers.attention_backends import SDPA, CuDNNAttention, FlashAttention, FlexAttention, SageAttention

GENERATOR = torch.Generator().manual_seed(0)


def qkv(tokens: int, batch: int = 2, heads: int = 3, dim: int = 16):
    return tuple(torch.randn(batch, tokens, heads, dim, generator=GENERATOR) for _ in range(3))


def definition(query, key, value, mask):
    query, key, value = (x.double().transpose(1, 2) for x in (query, key, value))
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2).float()


@pytest.mark.parametrize("backend", [SDPA, FlexAttention])
@pytest.mark.parametrize("masked", [False, True])
def test_backends_that_run_here(backend, masked, monkeypatch):
    """flex_attention runs without its compiler here; tests/engine/test_runner.py compiles it."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    query, key, value = qkv(37)
    mask = torch.arange(37) < torch.tensor([[37], [20]]) if masked else None
    have = backend()(query, key, value, mask)
    assert (have - definition(query, key, value, mask)).abs().max() < 1e-5  # float32 rounding


def test_streams_are_joined_and_handed_back():
    """Two streams attend to each other, with the mask of one, and each gets its own tokens back."""
    text, image = qkv(5), qkv(9)
    mask = torch.arange(5) < torch.tensor([[5], [2]])
    text_out, image_out = Attention()({"text": text, "image": image}, {"text": mask})
    joint = [torch.cat(pair, dim=1) for pair in zip(text, image, strict=True)]
    full = torch.cat([mask, torch.ones(2, 9, dtype=torch.bool)], dim=1)
    want = definition(*joint, full).flatten(2)
    assert (text_out - want[:, :5]).abs().max() < 1e-5
    assert (image_out - want[:, 5:]).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["joint", "cross"])
def test_groups_of_heads_share_keys_and_values(kind):
    query = qkv(7, heads=6)[0]
    _, key, value = qkv(7, heads=2)
    each = [torch.stack([x[:, :, head // 3] for head in range(6)], dim=2) for x in (key, value)]
    want = definition(query, *each, None).flatten(2)
    have = Attention()({"a": (query, key, value)})[0] if kind == "joint" else CrossAttention()(query, key, value)
    assert (have - want).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("backend", "hint"),
    [
        (FlashAttention, "pip install flash-attn --no-build-isolation"),
        (SageAttention, "pip install .*SageAttention"),
        (CuDNNAttention, "needs an NVIDIA GPU"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="these refusals are those of a machine without a GPU")
def test_what_is_not_here_is_refused_with_the_way_to_get_it(backend, hint):
    with pytest.raises(UsageError, match=hint) as caught:
        backend()
    assert "attention=sdpa" in str(caught.value)


@pytest.mark.parametrize(
    ("modules", "name"),
    [
        (["flash_attn"], "flash_attn2"),
        (["flash_attn", "flash_attn_interface"], "flash_attn3"),
        (["flash_attn", "flash_attn_interface", "flash_attn.cute"], "flash_attn4"),
    ],
)
def test_flash_takes_the_newest_that_is_installed(monkeypatch, modules, name):
    """Uses fake modules with the packages' names and signature, to test the choice and the layout."""
    for module in modules:
        stand_in = ModuleType(module)
        stand_in.flash_attn_func = lambda q, k, v: (definition(q, k, v, None), "lse")
        monkeypatch.setitem(sys.modules, module, stand_in)
    backend = FlashAttention()
    assert backend.name == name
    query, key, value = qkv(11)
    assert torch.equal(backend(query, key, value, None), definition(query, key, value, None))
    with pytest.raises(UsageError, match="attention=flash cannot mask padding"):
        backend(query, key, value, torch.ones(2, 11, dtype=torch.bool))
