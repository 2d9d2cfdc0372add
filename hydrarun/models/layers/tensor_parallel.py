"""Tensor parallelism (Megatron-LM, https://arxiv.org/abs/1909.08053): each rank has its share of every block's weights.

Layers that can be shared out say so themselves (`Shared`), so this knows no model. Between layers the activations are
whole on every rank; embeddings, modulations, norms within a head and the head are, too.

Bytes that a rank of n sends in one forward, by all_reduce alone: 2 (n - 1) / n times, for each block, B batch, S latent
tokens, T text tokens, D channels of e bytes:

- dual-stream, and Z-Image: 2 B (S + T) D e, the output of attention and of feed-forward;
- single-stream: B (S + T) D e, both outputs in one sum;
- Wan: 3 B S D e, with cross-attention, and 4 B (3 S + T) for the float32 sums of squares of queries and keys.
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
    """Rows or columns of a weight that are dealt out to ranks: `count` units (heads, say) of `width`, each whole."""

    count: int
    width: int = 1

    def __len__(self) -> int:
        return self.count * self.width

    def share(self, axis: Axis | None) -> tuple[int, int]:
        """This rank's first, and the one after its last."""
        if axis is None:
            return 0, len(self)
        counts = split_evenly(self.count, axis.size)
        start = sum(counts[: axis.rank])
        return start * self.width, (start + counts[axis.rank]) * self.width


class ShardedModule(nn.Module):
    """A layer of whose weights each rank can hold a share. Without an axis it is the plain layer."""

    #: `{parameter: dimension}` of those that are shared out; the others are whole on every rank
    shared_dims: ClassVar[Mapping[str, int]]
    #: what that dimension consists of, one after the other; of each, a rank holds its share
    runs: tuple[ShardSpec, ...]
    axis: Axis | None = None

    def share(self, axis: Axis) -> None:
        """Make the parameters, which are on the meta device, those of this rank."""
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
    """Give every layer that can be shared out this rank's share; between building on meta and loading.

    Raises `UsageError` where there is nothing to share, or less than the ranks take.
    """
    layers = list(find_sharded_layers(transformer))
    most = min((run.count for layer in layers for run in layer.runs), default=1)
    if axis.size > most:
        raise UsageError(
            f"parallel.tensor_degree={axis.size}: the weights of {type(transformer).__name__} can be shared out to"
            f" {most} ranks at most, because every head stays whole. Use parallel.tensor_degree={most} or less"
        )
    for layer in layers:
        layer.share(axis)


def find_sharded_layers(transformer: nn.Module) -> Iterator[Any]:
    """Every layer that can be shared out."""
    return (module for module in transformer.modules() if isinstance(module, ShardedModule))
