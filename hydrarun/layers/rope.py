"""Rotary position embedding (RoFormer, https://arxiv.org/abs/2104.09864), on pairs of neighbouring channels."""

from __future__ import annotations

import torch
from torch import Tensor


def frequencies(positions: Tensor, dim: int, theta: float = 10000.0) -> Tensor:
    """Positions `[S]` to cosines and sines `[S, 2, dim / 2]`, in float32."""
    rates = 1.0 / torch.pow(theta, torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    angles = torch.outer(positions.to(torch.float32), rates)
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Turn each pair of channels of `x` `[B, S, H, d]` by its position's angles `rope` `[S, 2, d / 2]`.

    Computed in float32 and returned in the dtype of `x`.
    """
    cos, sin = rope.unsqueeze(2).unbind(1)
    real, imaginary = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], dim=-1)
    return turned.flatten(-2).to(x.dtype)
