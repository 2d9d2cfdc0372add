"""Rotary position embedding (RoFormer, https://arxiv.org/abs/2104.09864), on pairs of neighbouring channels."""

from __future__ import annotations

import torch
from torch import Tensor


def frequencies(positions: Tensor, dim: int, theta: float = 10000.0) -> Tensor:
    """Positions `[S]` to cosine and sine of each pair's angle, `[S, dim / 2, 2]`, in float32."""
    rates = 1.0 / torch.pow(theta, torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    angles = torch.outer(positions.to(torch.float32), rates)
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Turn each pair of channels of `x` `[B, S, H, d]` by its position's angle in `rope` `[S, d / 2, 2]`.

    Computed in float32 and returned in the dtype of `x`.
    """
    pairs, rope = x.float().unflatten(-1, (-1, 2)), rope.unsqueeze(1)
    if torch.compiler.is_compiling():  # the compiler fuses this with its neighbours, and leaves complex numbers alone
        (cos, sin), (real, imaginary) = rope.unbind(-1), pairs.unbind(-1)
        turned = torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], dim=-1)
    else:  # one kernel instead of seven
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rope))
    return turned.flatten(-2).to(x.dtype)
