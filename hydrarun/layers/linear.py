"""Linear layers of a block, named by what they are to it."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class HeadsLinear(nn.Linear):
    """One product for several projections that are cut into heads. Weight rows: all of the first, then the next."""

    parts = 1

    def __init__(self, dim: int, heads: int, head_dim: int) -> None:
        super().__init__(dim, self.parts * heads * head_dim)
        self.head_dim = head_dim
        #: rows of each projection, for the loading of checkpoints that hold them apart
        self.fused_rows = (heads * head_dim,) * self.parts

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, ...]:
        """`[B, S, D]` to `parts` tensors `[B, S, H, d]`."""
        return super().forward(hidden_states).unflatten(-1, (self.parts, -1, self.head_dim)).unbind(2)


class QKVLinear(HeadsLinear):
    """Queries, keys and values in one product."""

    parts = 3


class KVLinear(HeadsLinear):
    """Keys and values in one product, for cross-attention."""

    parts = 2


class FeedForward(nn.Module):
    """Linear, GELU (tanh approximation), linear. `inner`: the width inside, by default the usual fourfold."""

    def __init__(self, dim: int, inner: int | None = None) -> None:
        super().__init__()
        self.up = nn.Linear(dim, inner or 4 * dim)
        self.down = nn.Linear(inner or 4 * dim, dim)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[B, S, D]` to `[B, S, D]`."""
        return self.down(F.gelu(self.up(hidden_states), approximate="tanh"))
