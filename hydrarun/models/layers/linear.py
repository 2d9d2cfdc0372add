"""Linear layers of a block, named by what they are to it; of their weights each rank can hold a share.

A column-parallel layer computes some of the outputs, a row-parallel one takes some of the inputs: one after the other,
they need one sum over the ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from hydrarun.core.distributed.collectives import all_reduce
from hydrarun.models.layers.tensor_parallel import ShardedModule, ShardSpec


class ColumnParallelLinear(ShardedModule, nn.Linear):
    """`[..., D]` to this rank's share of the outputs, which consist of `runs`."""

    shared_dims: ClassVar[Mapping[str, int]] = {"weight": 0, "bias": 0}

    def __init__(self, dim: int, *runs: ShardSpec, bias: bool = True) -> None:
        super().__init__(dim, sum(map(len, runs)), bias=bias)
        self.runs = runs


class RowParallelLinear(ShardedModule, nn.Linear):
    """This rank's share of the inputs, which consist of `runs`, to the whole output `[..., D]`."""

    shared_dims: ClassVar[Mapping[str, int]] = {"weight": 1}

    def __init__(self, dim: int, *runs: ShardSpec, bias: bool = True) -> None:
        super().__init__(sum(map(len, runs)), dim, bias=bias)
        self.runs = runs

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[..., share]` to `[..., D]`."""
        if self.axis is None:
            return super().forward(hidden_states)
        # the bias last: within one part, a large one would be rounded twice in half precision
        output = all_reduce(F.linear(hidden_states, self.weight), self.axis.group)
        return output if self.bias is None else output.add_(self.bias)


class HeadsLinear(ColumnParallelLinear):
    """One product for several projections that are cut into heads. Weight rows: all of the first, then the next."""

    parts = 1

    def __init__(self, dim: int, heads: int, head_dim: int, bias: bool = True) -> None:
        super().__init__(dim, *[ShardSpec(heads, head_dim)] * self.parts, bias=bias)
        self.head_dim = head_dim

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, ...]:
        """`[B, S, D]` to `parts` tensors `[B, S, H, d]`, H being this rank's heads."""
        return super().forward(hidden_states).unflatten(-1, (self.parts, -1, self.head_dim)).unbind(2)


class QKVLinear(HeadsLinear):
    """Queries, keys and values in one product."""

    parts = 3


class KVLinear(HeadsLinear):
    """Keys and values in one product, for cross-attention."""

    parts = 2


class GatedColumnParallelLinear(ColumnParallelLinear):
    """Out to the width inside a feed-forward, and through what is not linear there: GELU (tanh approximation).

    `gated`: two projections instead, whose product of the first and the second's SiLU it is (SwiGLU,
    https://arxiv.org/abs/2002.05202). Weight rows: all of the first, then the second.
    """

    def __init__(self, dim: int, inner: int, gated: bool = False, bias: bool = True) -> None:
        super().__init__(dim, *[ShardSpec(inner)] * (2 if gated else 1), bias=bias)
        self.gated = gated

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[B, S, D]` to this rank's share of the width inside."""
        projected = super().forward(hidden_states)
        if not self.gated:
            return F.gelu(projected, approximate="tanh")
        values, gates = projected.chunk(2, dim=-1)
        return F.silu(gates) * values


class FeedForward(nn.Module):
    """Out, through GELU or a gate, and back in. `inner`: the width inside, by default the usual fourfold."""

    def __init__(self, dim: int, inner: int | None = None, gated: bool = False, bias: bool = True) -> None:
        super().__init__()
        width = inner or 4 * dim
        self.up = GatedColumnParallelLinear(dim, width, gated, bias)
        self.down = RowParallelLinear(dim, ShardSpec(width), bias=bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[B, S, D]` to `[B, S, D]`."""
        return self.down(self.up(hidden_states))
