"""Attention: the only layers through which tokens see each other.

Blocks hand over queries, keys and values; these layers compute with the chosen backend. `[B, S, H, D]` everywhere:
batch, tokens, heads, channels of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from hydrarun.layers.backends import SDPA


class AttentionBackend(Protocol):
    """Computes attention. `mask` `[B, K]` bool says which keys are real; None: all are."""

    name: str

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor: ...


class AttentionLayer(nn.Module):
    """What all attention layers have: the backend."""

    def __init__(self) -> None:
        super().__init__()
        self.backend: AttentionBackend = SDPA()


class Attention(AttentionLayer):
    """Joint attention over one or more streams of tokens: each token attends to those of every stream."""

    def forward(
        self, streams: Sequence[tuple[Tensor, Tensor, Tensor]], masks: Sequence[Tensor | None] = ()
    ) -> list[Tensor]:
        """(query, key, value) of each stream, each `[B, S, H, D]`, to each stream's output `[B, S, H * D]`.

        A stream's mask `[B, S]` is True where a token is real; None: all of them are. No masks: none has one.
        """
        query, key, value = (torch.cat(parts, dim=1) for parts in zip(*streams, strict=True))
        output = self.backend(query, key, value, join_masks(streams, masks))
        return list(output.flatten(2).split([stream[0].shape[1] for stream in streams], dim=1))


class CrossAttention(AttentionLayer):
    """Latent tokens attend to a context that every rank holds whole; the context does not attend."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """`[B, S, H, D]`, twice `[B, T, H, D]` to `[B, S, H * D]`."""
        return self.backend(query, key, value, None).flatten(2)


def join_masks(streams: Sequence[tuple[Tensor, Tensor, Tensor]], masks: Sequence[Tensor | None]) -> Tensor | None:
    """One mask `[B, S]` over all streams' keys, or None when nothing is masked."""
    if all(mask is None for mask in masks):
        return None
    keys = [stream[1] for stream in streams]
    full = [key.new_ones(key.shape[:2], dtype=torch.bool) for key in keys]
    return torch.cat([other if mask is None else mask for mask, other in zip(masks, full, strict=True)], dim=1)
