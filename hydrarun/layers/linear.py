"""Linear layers of a block, named by what they are to it."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class QKVLinear(nn.Linear):
    """Queries, keys and values in one product. Weight rows: all of q, then k, then v."""

    def __init__(self, dim: int, heads: int, head_dim: int) -> None:
        super().__init__(dim, 3 * heads * head_dim)
        self.head_dim = head_dim
        #: rows of q, k and v, for the loading of checkpoints that hold them apart
        self.fused_rows = (heads * head_dim,) * 3

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`[B, S, D]` to three tensors `[B, S, H, d]`."""
        query, key, value = super().forward(hidden_states).unflatten(-1, (3, -1, self.head_dim)).unbind(2)
        return query, key, value


class FeedForward(nn.Module):
    """Linear, GELU (tanh approximation), linear, with the usual fourfold width inside."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, 4 * dim)
        self.down = nn.Linear(4 * dim, dim)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[B, S, D]` to `[B, S, D]`."""
        return self.down(F.gelu(self.up(hidden_states), approximate="tanh"))
