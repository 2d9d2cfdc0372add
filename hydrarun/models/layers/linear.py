"""Linear layers of a block, named by their role. Their weights can be sharded across ranks.

A column-parallel layer computes a shard of the outputs, a row-parallel layer takes a shard of the inputs. A pair of
them needs a single sum over the ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from hydrarun.core.distributed.collectives import all_reduce
from hydrarun.models.layers.tensor_parallel import ShardedModule, ShardSpec


class ColumnParallelLinear(ShardedModule, nn.Linear):
    """Maps `[..., D]` to this rank's shard of the outputs. `runs` are the consecutive parts of the outputs."""

    shared_dims: ClassVar[Mapping[str, int]] = {"weight": 0, "bias": 0}

    def __init__(self, dim: int, *runs: ShardSpec, bias: bool = True) -> None:
        super().__init__(dim, sum(map(len, runs)), bias=bias)
        self.runs = runs


class RowParallelLinear(ShardedModule, nn.Linear):
    """Maps this rank's shard of the inputs to the whole output `[..., D]`. `runs` are the parts of the inputs."""

    shared_dims: ClassVar[Mapping[str, int]] = {"weight": 1}

    def __init__(self, dim: int, *runs: ShardSpec, bias: bool = True) -> None:
        super().__init__(sum(map(len, runs)), dim, bias=bias)
        self.runs = runs

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map `[..., shard]` to `[..., D]`."""
        if self.axis is None:
            return super().forward(hidden_states)
        # add the bias after the sum: added to one rank's part, a large bias would be rounded twice in half precision
        output = all_reduce(F.linear(hidden_states, self.weight), self.axis.group)
        return output if self.bias is None else output.add_(self.bias)


class HeadsLinear(ColumnParallelLinear):
    """Several projections into heads as one matrix product. Weight rows: all of the first, then the next."""

    parts = 1

    def __init__(self, dim: int, heads: int, head_dim: int, bias: bool = True) -> None:
        super().__init__(dim, *[ShardSpec(heads, head_dim)] * self.parts, bias=bias)
        self.head_dim = head_dim

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, ...]:
        """Map `[B, S, D]` to `parts` tensors `[B, S, H, d]`, with H heads on this rank."""
        return super().forward(hidden_states).unflatten(-1, (self.parts, -1, self.head_dim)).unbind(2)


class QKVLinear(HeadsLinear):
    """Queries, keys and values in one product."""

    parts = 3


class KVLinear(HeadsLinear):
    """Keys and values in one product, for cross-attention."""

    parts = 2


class GatedColumnParallelLinear(ColumnParallelLinear):
    """First layer of a feed-forward: projection to the inner width, then GELU (tanh approximation).

    `gated`: two projections instead; the result is the first times the SiLU of the second (SwiGLU,
    https://arxiv.org/abs/2002.05202). Weight rows: all of the first, then the second.
    """

    def __init__(self, dim: int, inner: int, gated: bool = False, bias: bool = True) -> None:
        super().__init__(dim, *[ShardSpec(inner)] * (2 if gated else 1), bias=bias)
        self.gated = gated

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map `[B, S, D]` to this rank's shard of the inner width."""
        projected = super().forward(hidden_states)
        if not self.gated:
            return F.gelu(projected, approximate="tanh")
        values, gates = projected.chunk(2, dim=-1)
        return F.silu(gates) * values


class FeedForward(nn.Module):
    """Feed-forward layer with GELU or, if `gated`, SwiGLU. `inner`: the inner width, by default 4 * dim."""

    def __init__(self, dim: int, inner: int | None = None, gated: bool = False, bias: bool = True) -> None:
        super().__init__()
        width = inner or 4 * dim
        self.up = GatedColumnParallelLinear(dim, width, gated, bias)
        self.down = RowParallelLinear(dim, ShardSpec(width), bias=bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map `[B, S, D]` to `[B, S, D]`."""
        return self.down(self.up(hidden_states))
