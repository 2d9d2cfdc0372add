"""Norms: adaptive norms with shift and scale from the timestep (DiT, https://arxiv.org/abs/2212.09748), and an RMS norm
over all heads of a query or key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hydrarun.core.distributed.collectives import all_reduce
from hydrarun.core.distributed.mesh import Axis
from hydrarun.models.layers.tensor_parallel import ShardedModule, ShardSpec


class Modulation(nn.Module):
    """Shifts, scales and gates from the global conditioning.

    The values depend on `temb` alone, not on the tokens. Blocks name this submodule `modulation`, so that a table of
    precomputed values can replace it. `width`: channels of `temb`, by default `dim`. `activated`: apply SiLU to `temb`.
    """

    def __init__(self, dim: int, parts: int, width: int | None = None, activated: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(width or dim, parts * dim)
        self.parts = parts
        self.activated = activated

    def forward(self, temb: Tensor, index: Tensor | None = None) -> tuple[Tensor, ...]:
        """Map `[B, K, D]` to `parts` tensors `[B, K, D]`, or, given each token's `index` `[S]`, `[B, S, D]`."""
        return select_by_token(self.values(temb), index).chunk(self.parts, dim=-1)

    def values(self, temb: Tensor) -> Tensor:
        """Map `[..., D]` to all parts, concatenated: `[..., parts * D]`."""
        return self.linear(F.silu(temb) if self.activated else temb)


def select_by_token(values: Tensor, index: Tensor | None) -> Tensor:
    """Select each token's timestep: `[B, K, ...]` to `[B, S, ...]`. Without an `index`, return `values` unchanged."""
    return values if index is None else values.index_select(1, index)


def modulate(hidden_states: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """Apply layer norm without weights to `[B, S, D]`, then `(1 + scale) * x + shift`."""
    normed = F.layer_norm(hidden_states, hidden_states.shape[-1:], eps=eps)
    return torch.addcmul(shift, normed, 1 + scale)


class AdaLayerNorm(nn.Module):
    """Norm before a transformer's last projection. Its weights hold the scale first, then the shift."""

    def __init__(self, dim: int, width: int | None = None, eps: float = 1e-6) -> None:
        super().__init__()
        self.modulation = Modulation(dim, parts=2, width=width)
        self.eps = eps

    def forward(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
        """Map `[B, S, D]` and `[B, 1, D]` to `[B, S, D]`."""
        scale, shift = self.modulation(temb)
        return modulate(hidden_states, shift, scale, self.eps)


class RMSNormAcrossHeads(ShardedModule, nn.RMSNorm):
    """RMS norm over the channels of all heads together. If heads are sharded, sums the squares over the ranks."""

    shared_dims: ClassVar[Mapping[str, int]] = {"weight": 0}

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__(heads * head_dim, eps=1e-6)
        self.runs = (ShardSpec(heads, head_dim),)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `[B, S, H, d]`, with H heads on this rank."""
        channels = x.flatten(2)
        normed = super().forward(channels) if self.axis is None else self.over_ranks(channels, self.axis)
        return normed.unflatten(2, x.shape[2:])

    def over_ranks(self, x: Tensor, axis: Axis) -> Tensor:
        """Normalise `[B, S, this rank's channels]`, in float32 like the plain norm."""
        wide = x.float()
        squares = all_reduce(wide.square().sum(-1, keepdim=True), axis.group)
        return (wide * torch.rsqrt(squares / len(self.runs[0]) + self.eps) * self.weight.float()).to(x.dtype)
