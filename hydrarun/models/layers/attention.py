"""Attention: the only layers in which tokens interact.

Blocks pass queries, keys and values; these layers compute with the selected backend. Shapes are `[B, S, H, D]`: batch,
tokens, heads, channels per head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hydrarun.models.layers.attention_backends import SDPA

QKV = tuple[Tensor, Tensor, Tensor]
#: keys and values `[1, P, H, D]` of earlier tokens, for the heads that this rank computes
Prefix = tuple[Tensor, Tensor]


class AttentionBackend(Protocol):
    """Computes attention. `mask` `[B, K]` bool is True for real keys; None: all are real."""

    name: str

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor: ...


class AttentionLayer(nn.Module):
    """Base class of the attention layers; holds the backend."""

    def __init__(self) -> None:
        super().__init__()
        self.backend: AttentionBackend = SDPA()


class Attention(AttentionLayer):
    """Joint attention over one or more streams of tokens: each token attends to the tokens of every stream.

    If tokens are sharded across ranks, `sequence` replaces the plain computation
    (`hydrarun.acceleration.parallel.sequence`).
    """

    def __init__(self) -> None:
        super().__init__()
        self.sequence: Any = None

    def forward(
        self,
        streams: Mapping[str, QKV],
        masks: Mapping[str, Tensor | None] | None = None,
        prefix: Prefix | None = None,
    ) -> list[Tensor]:
        """Map each stream's (query, key, value), `[B, S, H, D]` each, to its output `[B, S, H * D]`.

        Keys and values may have fewer heads, each shared by a group of query heads. Streams are named by their fields
        in `Tokens`. A stream's mask `[B, S]` is True for real tokens and covers its tokens on all ranks; None, or no
        mask: all tokens are real. All tokens also attend to the `prefix`, which `keep` returned.
        """
        masks = masks or {}
        streams = {name: repeat_kv_heads(*stream) for name, stream in streams.items()}
        if self.sequence is not None:
            return self.sequence(streams, masks, self.backend, prefix)
        query, key, value = (torch.cat(parts, dim=1) for parts in zip(*streams.values(), strict=True))
        lengths: Mapping[str, int] = {name: stream[1].shape[1] for name, stream in streams.items()}
        key, value, lengths = prepend_prefix(prefix, key, value, lengths)
        output = self.backend(query, key, value, join_masks(masks, lengths))
        return list(output.flatten(2).split([stream[0].shape[1] for stream in streams.values()], dim=1))

    def keep(self, stream: str, key: Tensor, value: Tensor) -> Prefix:
        """Return a stream's keys and values `[1, S, H, D]` as a prefix for later calls."""
        return (key, value) if self.sequence is None else self.sequence.keep(stream, key, value)


class CrossAttention(AttentionLayer):
    """Latent tokens attend to a context that is replicated on every rank; the context does not attend."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Map queries `[B, S, H, D]`, keys and values `[B, T, H, D]` to `[B, S, H * D]`."""
        return self.backend(*repeat_kv_heads(query, key, value), None).flatten(2)


def repeat_kv_heads(query: Tensor, key: Tensor, value: Tensor) -> QKV:
    """Repeat each key and value head for every query head in its group."""
    groups = query.shape[2] // key.shape[2]
    if groups == 1:
        return query, key, value
    return query, key.repeat_interleave(groups, dim=2), value.repeat_interleave(groups, dim=2)


def prepend_prefix(
    prefix: Prefix | None, key: Tensor, value: Tensor, lengths: Mapping[str, int]
) -> tuple[Tensor, Tensor, Mapping[str, int]]:
    """Prepend the prefix, if any, to keys and values `[B, S, H, D]` and to the lengths of their streams."""
    if prefix is None:
        return key, value, lengths
    before = [kept.expand(len(key), -1, -1, -1) for kept in prefix]
    joined = (torch.cat(pair, dim=1) for pair in zip(before, (key, value), strict=True))
    return *joined, {"prefix": before[0].shape[1], **lengths}


def join_masks(masks: Mapping[str, Tensor | None], lengths: Mapping[str, int]) -> Tensor | None:
    """Join the masks into one `[B, S]` over the keys of all streams, or return None if nothing is masked."""
    given = [mask for mask in masks.values() if mask is not None]
    if not given:
        return None
    batch = given[0].shape[0]
    full = {name: masks.get(name) for name in lengths}
    return torch.cat(
        [given[0].new_ones(batch, lengths[name]) if mask is None else mask for name, mask in full.items()], dim=1
    )
