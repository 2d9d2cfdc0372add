"""Norms, projections, rotary embeddings and feed-forwards, each against its definition."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from hydrarun.models.layers.linear import FeedForward, QKVLinear
from hydrarun.models.layers.norm import AdaLayerNorm, Modulation, modulate
from hydrarun.models.layers.rope import apply_rope, make_frequencies, make_grid_frequencies


def test_rotation_is_complex_multiplication():
    x = torch.randn(2, 7, 3, 8)
    rope = make_frequencies(torch.arange(-3, 4), 8)
    angles = torch.outer(torch.arange(-3, 4).double(), 10000.0 ** (-torch.arange(0, 8, 2).double() / 8))
    turned = torch.view_as_complex(x.double().reshape(2, 7, 3, 4, 2)) * torch.polar(
        torch.ones(7, 1, 4).double(), angles[:, None]
    )
    want = torch.view_as_real(turned).flatten(-2).float()
    assert (apply_rope(x, rope) - want).abs().max() < 1e-6


def test_compiled_rotation_is_the_same_rotation():
    x, rope = torch.randn(2, 7, 3, 8), make_frequencies(torch.arange(-3, 4), 8)
    compiled = torch.compile(apply_rope, fullgraph=True, backend="aot_eager")
    assert (compiled(x, rope) - apply_rope(x, rope)).abs().max() < 1e-6


def test_rotation_keeps_norms_and_dtype():
    x = torch.randn(1, 5, 2, 8, dtype=torch.bfloat16)
    turned = apply_rope(x, make_frequencies(torch.arange(5), 8))
    assert turned.dtype == torch.bfloat16
    assert (turned.float().norm(dim=-1) - x.float().norm(dim=-1)).abs().max() < 0.03  # 8 bits of a norm near 3


def test_fused_projection_is_three_projections():
    layer = QKVLinear(12, heads=3, head_dim=4)
    x = torch.randn(2, 5, 12)
    for part, (weight, bias) in zip(
        layer(x), zip(layer.weight.chunk(3), layer.bias.chunk(3), strict=True), strict=True
    ):
        assert part.shape == (2, 5, 3, 4)
        assert (part.flatten(2) - F.linear(x, weight, bias)).abs().max() < 1e-6


def test_modulate_is_shift_and_scale_of_the_norm():
    x, shift, scale = torch.randn(2, 5, 12), torch.randn(2, 1, 12), torch.randn(2, 1, 12)
    normed = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    assert (modulate(x, shift, scale) - (normed * (1 + scale) + shift)).abs().max() < 1e-5


def test_modulation_has_its_parts_in_order():
    layer = Modulation(4, parts=3)
    temb = torch.randn(2, 1, 4)
    want = layer.linear(F.silu(temb))
    for index, part in enumerate(layer(temb)):
        assert torch.equal(part, want[..., 4 * index : 4 * index + 4])


def test_tokens_of_several_timesteps_get_each_its_own_modulation():
    layer = Modulation(4, parts=2)
    temb, index = torch.randn(2, 3, 4), torch.tensor([2, 0, 0, 1, 2])
    want = layer.linear(F.silu(temb))
    for number, part in enumerate(layer(temb, index)):
        assert part.shape == (2, 5, 4)
        for token, time in enumerate(index):
            assert torch.equal(part[:, token], want[:, time, 4 * number : 4 * number + 4])


def test_last_norm_has_the_scale_first():
    layer = AdaLayerNorm(4)
    x, temb = torch.randn(2, 5, 4), torch.randn(2, 1, 4)
    scale, shift = layer.modulation.linear(F.silu(temb)).chunk(2, -1)
    assert (layer(x, temb) - (F.layer_norm(x, (4,), eps=1e-6) * (1 + scale) + shift)).abs().max() < 1e-6


def test_feed_forward():
    layer = FeedForward(4)
    x = torch.randn(2, 4)
    inner = F.gelu(F.linear(x, layer.up.weight, layer.up.bias), approximate="tanh")
    assert torch.equal(layer(x), layer.down(inner))
    assert layer.up.out_features == 16
    assert FeedForward(4, inner=10).up.out_features == 10


def test_gated_feed_forward():
    """The values' rows come first, then the gates'."""
    layer = FeedForward(4, inner=3, gated=True)
    x = torch.randn(2, 4)
    projected = F.linear(x, layer.up.weight, layer.up.bias)
    assert torch.equal(layer(x), layer.down(F.silu(projected[:, 3:]) * projected[:, :3]))


def test_a_grid_joins_the_angles_of_its_axes():
    axes = [make_frequencies(torch.arange(n), dim) for n, dim in ((2, 4), (3, 2), (5, 6))]
    table = make_grid_frequencies(axes)
    assert table.shape == (30, 6, 2)
    for frame, row, column in ((0, 0, 0), (1, 2, 4), (1, 0, 3)):
        want = torch.cat([axes[0][frame], axes[1][row], axes[2][column]])
        assert torch.equal(table[(frame * 3 + row) * 5 + column], want)


def test_gated_feed_forward_is_its_formula():
    layer = FeedForward(4, inner=6, gated=True, bias=False)
    x = torch.randn(2, 3, 4)
    up, gate = layer.up.weight.split(6)
    want = (F.silu(x @ gate.T) * (x @ up.T)) @ layer.down.weight.T
    assert layer.up.bias is None
    assert layer.down.bias is None
    assert (layer(x) - want).abs().max() < 1e-6


def test_rotation_by_positions_of_each_items_own():
    x = torch.randn(2, 3, 1, 8)
    ropes = [make_frequencies(torch.arange(start, start + 3), 8) for start in (0, 5)]
    have = apply_rope(x, torch.stack(ropes))
    for item, rope in enumerate(ropes):
        assert (have[item] - apply_rope(x[item : item + 1], rope)[0]).abs().max() < 1e-6


def test_modulation_of_another_width_without_activation():
    layer = Modulation(4, parts=2, width=3, activated=False)
    temb = torch.randn(2, 1, 3)
    first, second = layer(temb)
    assert torch.equal(torch.cat([first, second], dim=-1), layer.linear(temb))
