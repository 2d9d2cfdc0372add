"""Sequence parallel: each rank has a part of the tokens; only attention reads those of others (DeepSpeed-Ulysses,
https://arxiv.org/abs/2309.14509; ring attention, https://arxiv.org/abs/2310.01889; both together: USP, https://arxiv.org/abs/2405.07719).

Text tokens are split like latent tokens. If they were replicated, every rank would compute all of the text's
projections and feed-forwards and, since heads are split, would have to gather the text's whole attention output. Split,
each rank computes and sends only its share. A context that is only cross-attended stays whole: its outputs are unused.

Lengths and head counts need not be divisible: shares differ by at most one, and nothing is padded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from hydrarun.core.distributed.collectives import RingExchange, all_gather, all_to_all
from hydrarun.core.distributed.degrees import split_evenly
from hydrarun.core.distributed.mesh import Axis
from hydrarun.models.layers.attention import QKV, AttentionBackend, Prefix, join_masks, prepend_prefix

T = TypeVar("T", bound=Any)
Masks = Mapping[str, Tensor | None]


class SequenceParallel:
    """Shards the tokens of one call over `ring x ulysses` ranks: part `r * U + u` is at ring place r, Ulysses place u.

    Bytes sent by a rank, for one attention over local `[B, s, H, d]` in elements of e bytes, with h of the H heads on
    this rank and S tokens in its ring place: Ulysses `3 B s (H - h) d e` for queries, keys and values, in one exchange,
    and `B (S - s) h d e` for the result; ring `2 B S h d e` for each of its `R - 1` turns. After the blocks the hidden
    states are gathered once: `B s D e` to each other rank of the Ulysses group, then `B S D e` to each other rank of
    the ring.
    """

    def __init__(self, ulysses: Axis | None, ring: Axis | None) -> None:
        self.ulysses, self.ring = ulysses, ring
        self.width = ulysses.size if ulysses else 1  # ranks per ring place
        self.size = self.width * (ring.size if ring else 1)
        self.place = ring.rank if ring else 0
        self.rank = self.place * self.width + (ulysses.rank if ulysses else 0)
        #: tokens of each stream on all ranks, in the current call
        self.lengths: dict[str, int] = {}

    def shard(self, tokens: T, streams: Sequence[str]) -> T:
        """Return this rank's part of every field that counts tokens of these streams; absent streams are skipped."""
        present = {name: getattr(tokens, name) for name in streams}
        self.lengths = {name: stream.shape[1] for name, stream in present.items() if stream is not None}
        parts = {}
        for field, (dim, stream) in tokens.token_dims().items():
            value = getattr(tokens, field)
            if value is not None and stream in self.lengths:
                parts[field] = value.split(split_evenly(value.shape[dim], self.size), dim)[self.rank].contiguous()
        return dataclasses.replace(tokens, **parts)

    def gather(self, hidden_states: Tensor) -> Tensor:
        """Gather each rank's `[B, s, D]` into `[B, S, D]` on every rank."""
        if self.ulysses:
            sizes = self.place_lengths("hidden_states", self.place)
            hidden_states = all_gather(hidden_states, 1, sizes, self.ulysses.group)
        if self.ring:
            rows = [sum(self.place_lengths("hidden_states", place)) for place in range(self.ring.size)]
            hidden_states = all_gather(hidden_states, 1, rows, self.ring.group)
        return hidden_states

    def place_lengths(self, stream: str, place: int) -> list[int]:
        """Return the number of a stream's tokens on each rank of a ring place."""
        return split_evenly(self.lengths[stream], self.size)[place * self.width : (place + 1) * self.width]

    @torch.compiler.disable
    def __call__(
        self, streams: Mapping[str, QKV], masks: Masks, backend: AttentionBackend, prefix: Prefix | None = None
    ) -> list[Tensor]:
        """Compute `Attention.forward` for this rank's tokens."""
        heads = next(iter(streams.values()))[0].shape[2]
        gathered = {name: torch.stack(parts) for name, parts in streams.items()}
        if self.ulysses:
            gathered = self.exchange_heads(gathered, heads, self.ulysses)
        query, key, value = torch.cat(list(gathered.values()), dim=2).unbind(0)
        if query.shape[2] == 0:  # more ranks than heads
            output = query
        elif self.ring:
            before = (
                None
                if prefix is None
                else attend_masked(query, *prepend_prefix(prefix, key[:, :0], value[:, :0], {})[:2], None, backend)
            )
            output = self.attend_in_ring(query, key, value, list(streams), masks, backend, self.ring, before)
        else:
            lengths: Mapping[str, int] = {name: sum(self.place_lengths(name, 0)) for name in streams}
            key, value, lengths = prepend_prefix(prefix, key, value, lengths)
            output = backend(query, key, value, join_masks(masks, lengths))
        lengths_here = [part.shape[2] for part in gathered.values()]
        outputs = dict(zip(streams, output.split(lengths_here, dim=1), strict=True))
        if self.ulysses:
            outputs = self.return_heads(outputs, heads, self.ulysses)
        return [part.flatten(2) for part in outputs.values()]

    @torch.compiler.disable
    def keep(self, stream: str, key: Tensor, value: Tensor) -> Prefix:
        """As `Attention.keep`: gather this rank's tokens `[1, s, H, d]` into all tokens of its heads, `[1, S, h, d]`.

        Later calls send nothing for them: each rank has all keys and values of its heads.
        """
        both = torch.stack([key, value])
        if self.ulysses:
            both = self.exchange_heads({stream: both}, key.shape[2], self.ulysses)[stream]
        if self.ring:
            counts = [sum(self.place_lengths(stream, place)) for place in range(self.ring.size)]
            both = all_gather(both, 2, counts, self.ring.group)
        return both[0], both[1]

    def exchange_heads(self, streams: Mapping[str, Tensor], heads: int, axis: Axis) -> dict[str, Tensor]:
        """Exchange each stream's `[n, B, s, H, d]` for `[n, B, S, h, d]`: the place's tokens, this rank's heads."""
        per_rank = split_evenly(heads, axis.size)
        cut = {name: part.split(per_rank, dim=3) for name, part in streams.items()}
        outgoing = [torch.cat([cut[name][rank].reshape(-1) for name in cut]) for rank in range(axis.size)]
        parts, batch, _, _, channels = next(iter(streams.values())).shape
        lengths = {name: self.place_lengths(name, self.place) for name in streams}
        shapes = [
            {name: (parts, batch, lengths[name][rank], per_rank[axis.rank], channels) for name in streams}
            for rank in range(axis.size)
        ]
        return self.join(all_to_all(outgoing, count_received(shapes), axis.group), shapes, dim=2)

    def return_heads(self, outputs: Mapping[str, Tensor], heads: int, axis: Axis) -> dict[str, Tensor]:
        """Exchange each stream's `[B, S, h, d]` back for `[B, s, H, d]`: this rank's tokens, all heads."""
        per_rank = split_evenly(heads, axis.size)
        cut = {name: part.split(self.place_lengths(name, self.place), dim=1) for name, part in outputs.items()}
        outgoing = [torch.cat([cut[name][rank].reshape(-1) for name in cut]) for rank in range(axis.size)]
        batch, _, _, channels = next(iter(outputs.values())).shape
        mine = {name: self.place_lengths(name, self.place)[axis.rank] for name in outputs}
        shapes = [
            {name: (batch, mine[name], per_rank[rank], channels) for name in outputs} for rank in range(axis.size)
        ]
        return self.join(all_to_all(outgoing, count_received(shapes), axis.group), shapes, dim=2)

    @staticmethod
    def join(
        received: Sequence[Tensor], shapes: Sequence[Mapping[str, tuple[int, ...]]], dim: int
    ) -> dict[str, Tensor]:
        """Join each stream's parts along `dim`, from flat buffers, one per rank, that hold all streams in order."""
        parts: dict[str, list[Tensor]] = {name: [] for name in shapes[0]}
        for buffer, by_stream in zip(received, shapes, strict=True):
            counts = [count_elements(shape) for shape in by_stream.values()]
            for (name, shape), flat in zip(by_stream.items(), buffer.split(counts), strict=True):
                parts[name].append(flat.view(shape))
        return {name: torch.cat(found, dim=dim) for name, found in parts.items()}

    def attend_in_ring(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        streams: Sequence[str],
        masks: Masks,
        backend: AttentionBackend,
        ring: Axis,
        total: Partial | None = None,
    ) -> Tensor:
        """Compute attention of `[B, S, h, d]` to the keys and values of every ring place.

        The next place's keys and values are sent while the current ones are used. `total`: partial attention to other
        keys, merged into the result.
        """
        for turn in range(ring.size):
            place = (self.place - turn) % ring.size  # ring place of the current keys
            exchange = None
            if turn + 1 < ring.size:
                length = sum(sum(self.place_lengths(name, (place - 1) % ring.size)) for name in streams)
                incoming = [key.new_empty(key.shape[0], length, *key.shape[2:]) for _ in range(2)]
                exchange = RingExchange([key, value], incoming, ring.group)
            part = attend_masked(query, key, value, self.mask_of(place, streams, masks), backend)
            total = part if total is None else merge_partials(total, part)
            if exchange is not None:
                key, value = exchange.wait()
        assert total is not None
        return total[0].to(query.dtype)

    def mask_of(self, place: int, streams: Sequence[str], masks: Masks) -> Tensor | None:
        """Return the mask over the keys of a ring place."""
        lengths = {name: sum(self.place_lengths(name, place)) for name in streams}
        here = {}
        for name, mask in masks.items():
            start = sum(sum(self.place_lengths(name, before)) for before in range(place))
            here[name] = None if mask is None else mask[:, start : start + lengths[name]]
        return join_masks(here, lengths)


#: attention to some of the keys, `[B, S, H, d]` float32, and the log-sum-exp of its scores, `[B, S, H, 1]`
Partial = tuple[Tensor, Tensor]


def attend_masked(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, backend: Any) -> Partial:
    """Compute attention to these keys alone. Masked keys are removed, sample by sample: the kernels take no masks."""
    if mask is None:
        return attend_unmasked(backend, query, key, value)
    samples = [
        attend_unmasked(backend, query[i : i + 1], key[i : i + 1, mask[i]], value[i : i + 1, mask[i]])
        for i in range(len(query))
    ]
    outputs, logs = zip(*samples, strict=True)
    return torch.cat(outputs), torch.cat(logs)


def attend_unmasked(backend: Any, query: Tensor, key: Tensor, value: Tensor) -> Partial:
    """Compute attention to these keys without a mask. Without keys the log-sum-exp is -inf, a weight of 0."""
    if key.shape[1] == 0:
        nothing = torch.zeros(query.shape, dtype=torch.float32, device=query.device)
        return nothing, nothing[..., :1] - torch.inf
    output, log = backend.with_log_sum(query, key, value)
    return output.float(), log.float().unsqueeze(-1)


def merge_partials(one: Partial, other: Partial) -> Partial:
    """Merge attention to two sets of keys (online softmax)."""
    log = torch.logaddexp(one[1], other[1])
    known = log.isfinite()  # infinite where neither part has keys: weight 0 instead of NaN
    weights = [torch.where(known, (x[1] - log).exp(), 0.0) for x in (one, other)]
    return one[0] * weights[0] + other[0] * weights[1], log


def count_elements(shape: Sequence[int]) -> int:
    """Return the number of elements of a tensor of this shape."""
    return torch.Size(shape).numel()


def count_received(shapes: Sequence[Mapping[str, tuple[int, ...]]]) -> list[int]:
    """Return the number of elements received from each rank."""
    return [sum(map(count_elements, by_stream.values())) for by_stream in shapes]
