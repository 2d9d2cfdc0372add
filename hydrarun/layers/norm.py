"""Adaptive layer norm: a norm whose shift and scale come from the timestep (DiT, https://arxiv.org/abs/2212.09748)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Modulation(nn.Module):
    """Shifts, scales and gates from the global conditioning.

    It depends on `temb` alone, not on the tokens: a block keeps it under the name `modulation`, where a table of
    precomputed values can take its place.
    """

    def __init__(self, dim: int, parts: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, parts * dim)
        self.parts = parts

    def forward(self, temb: Tensor, index: Tensor | None = None) -> tuple[Tensor, ...]:
        """`[B, K, D]` for K timesteps to `parts` tensors `[B, K, D]`, or `[B, S, D]` by each token's `index` `[S]`."""
        return by_token(self.linear(F.silu(temb)), index).chunk(self.parts, dim=-1)


def by_token(values: Tensor, index: Tensor | None) -> Tensor:
    """`[B, K, ...]` to `[B, S, ...]`: for each token the value of its timestep; unchanged where all share one."""
    return values if index is None else values.index_select(1, index)


def modulate(hidden_states: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm without weights of its own, then `(1 + scale) * x + shift`. `[B, S, D]`."""
    normed = F.layer_norm(hidden_states, hidden_states.shape[-1:], eps=1e-6)
    return torch.addcmul(shift, normed, 1 + scale)


class AdaLayerNorm(nn.Module):
    """The norm before a transformer's last projection. Its weights hold the scale first, then the shift."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.modulation = Modulation(dim, parts=2)

    def forward(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
        """`[B, S, D]`, `[B, 1, D]` to `[B, S, D]`."""
        scale, shift = self.modulation(temb)
        return modulate(hidden_states, shift, scale)
