"""Tensor parallelism (Megatron-LM, https://arxiv.org/abs/1909.08053): each rank holds a shard of every block's weights.

Layers that can be sharded derive from `ShardedModule`, so this module knows no model. Between layers, activations are
replicated on every rank. So are embeddings, modulations, norms within a head and the head.

Bytes that one of n ranks sends in one forward, all by all_reduce: 2 (n - 1) / n times the following for each block,
with batch B, S latent tokens, T text tokens, D channels of e bytes:

- dual-stream and Z-Image: 2 B (S + T) D e, for the outputs of attention and feed-forward;
- single-stream: B (S + T) D e, both outputs in one sum;
- Wan: 3 B S D e, including cross-attention, and 4 B (3 S + T) for the float32 sums of squares of queries and keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from hydrarun.core.distributed.degrees import split_evenly
from hydrarun.core.distributed.mesh import Axis
from hydrarun.core.errors import UsageError


@dataclass(frozen=True)
class ShardSpec:
    """Rows or columns of a weight that are split across ranks: `count` whole units (such as heads) of `width`."""

    count: int
    width: int = 1

    def __len__(self) -> int:
        return self.count * self.width

    def share(self, axis: Axis | None) -> tuple[int, int]:
        """Return this rank's first index and the one after its last."""
        if axis is None:
            return 0, len(self)
        counts = split_evenly(self.count, axis.size)
        start = sum(counts[: axis.rank])
        return start * self.width, (start + counts[axis.rank]) * self.width


class ShardedModule(nn.Module):
    """A layer whose weights can be sharded across ranks. Without an `axis` it is the plain layer."""

    #: `{parameter: dimension}` of the sharded parameters; the others are replicated on every rank
    shared_dims: ClassVar[Mapping[str, int]]
    #: consecutive parts of that dimension; a rank holds its shard of each part
    runs: tuple[ShardSpec, ...]
    axis: Axis | None = None

    def share(self, axis: Axis) -> None:
        """Replace the sharded parameters, which are on the meta device, with this rank's shards."""
        self.axis = axis
        bounds = [run.share(axis) for run in self.runs]
        for name, dim in self.shared_dims.items():
            parameter = getattr(self, name)
            if parameter is None:  # a layer without a bias
                continue
            shape = list(parameter.shape)
            shape[dim] = sum(stop - start for start, stop in bounds)
            setattr(self, name, nn.Parameter(parameter.new_empty(shape), requires_grad=False))


def shard_layers(transformer: nn.Module, axis: Axis) -> None:
    """Shard every layer that supports it, after building on the meta device and before loading.

    Raises `UsageError` for more ranks than units (such as heads), or if there is nothing to shard.
    """
    layers = list(find_sharded_layers(transformer))
    most = min((run.count for layer in layers for run in layer.runs), default=1)
    if axis.size > most:
        raise UsageError(
            f"parallel.tensor_degree={axis.size}: the weights of {type(transformer).__name__} can be split across"
            f" {most} ranks at most, because every head stays whole. Use parallel.tensor_degree={most} or less"
        )
    for layer in layers:
        layer.share(axis)


def find_sharded_layers(transformer: nn.Module) -> Iterator[Any]:
    """Return the layers that can be sharded."""
    return (module for module in transformer.modules() if isinstance(module, ShardedModule))
