"""Rotary position embedding (RoFormer, https://arxiv.org/abs/2104.09864), on pairs of channels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def make_frequencies(
    positions: Tensor, dim: int, theta: float = 10000.0, precision: torch.dtype = torch.float32
) -> Tensor:
    """Map positions `[S]` to each pair's cosine and sine, `[S, dim / 2, 2]` float32, computed in `precision`."""
    rates = 1.0 / torch.pow(theta, torch.arange(0, dim, 2, dtype=precision) / dim)
    angles = torch.outer(positions.to(precision), rates)
    return torch.stack([angles.cos(), angles.sin()], dim=-1).float()


def make_grid_frequencies(axes: Sequence[Tensor]) -> Tensor:
    """Combine the frequencies of frames `[F, f, 2]`, rows `[H, h, 2]` and columns `[W, w, 2]` for a grid of tokens.

    Returns `[F * H * W, f + h + w, 2]`, columns fastest.
    """
    sizes = [len(axis) for axis in axes]
    places = ((slice(None), None, None), (None, slice(None), None), (None, None, slice(None)))
    spread = [axis[place].expand(*sizes, -1, -1) for axis, place in zip(axes, places, strict=True)]
    return torch.cat(spread, dim=-2).flatten(0, 2)


def apply_rope(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate each pair of neighbouring channels of `x` `[B, S, H, d]` by its position's angle in `rope`.

    `rope` is `[S, d / 2, 2]`, or `[B, S, d / 2, 2]` if positions differ between items. Computed in float32 and returned
    in the dtype of `x`.
    """
    pairs, rope = x.float().unflatten(-1, (-1, 2)), rope.unsqueeze(-3)
    if torch.compiler.is_compiling():  # the compiler fuses this with neighbouring ops, but not complex ops
        (cos, sin), (real, imaginary) = rope.unbind(-1), pairs.unbind(-1)
        turned = torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], dim=-1)
    else:  # one kernel instead of seven
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rope))
    return turned.flatten(-2).to(x.dtype)


def rotate_halves(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate the first `d'` channels of `x` `[B, S, H, d]` like `apply_rope`, paired across halves.

    Channel i is paired with channel d' / 2 + i. `rope` is `[S, d' / 2, 2]`. The other channels are unchanged.
    """
    first, second, rest = x.float().split([rope.shape[-2], rope.shape[-2], x.shape[-1] - 2 * rope.shape[-2]], dim=-1)
    cos, sin = rope.unsqueeze(-3).unbind(-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1).to(x.dtype)
