"""The collectives that the parallel methods use, with a counter of the bytes that this rank sends to others.

Formulas for n ranks with a tensor of b bytes each: all_gather (n - 1) b; all_reduce 2 (n - 1) / n b (reduce-scatter,
then all-gather); all_to_all and exchange: the bytes addressed to other ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = Any  # torch.distributed.ProcessGroup

# renamed in torch 2.13
gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

#: bytes sent by this rank, by collective
sent_bytes: Counter[str] = Counter()


def get_world_group() -> Group:
    """Return the process group of all ranks."""
    return dist.group.WORLD


@torch.compiler.disable
def all_to_all(parts: Sequence[Tensor], sizes: Sequence[int], group: Group) -> list[Tensor]:
    """Send `parts[r]` to rank r and receive a flat tensor of `sizes[r]` elements from each rank r."""
    rank = group.rank()
    sent_bytes["all_to_all"] += sum(part.nbytes for other, part in enumerate(parts) if other != rank)
    counts = [part.numel() for part in parts]
    joined = torch.cat([part.reshape(-1) for part in parts])
    received = joined.new_empty(sum(sizes))
    dist.all_to_all_single(received, joined, list(sizes), counts, group=group)
    return list(received.split(list(sizes)))


@torch.compiler.disable
def all_gather(x: Tensor, dim: int, sizes: Sequence[int], group: Group) -> Tensor:
    """Concatenate every rank's `x` along `dim`, where rank r has `sizes[r]`; shorter ones are padded in transit."""
    longest, count = max(sizes), len(sizes)
    missing = longest - x.shape[dim]
    if missing:
        shape = list(x.shape)
        shape[dim] = missing
        x = torch.cat([x, x.new_zeros(shape)], dim=dim)
    sent_bytes["all_gather"] += x.nbytes * (count - 1)
    gathered = x.new_empty(count, *x.shape)
    gather_single(gathered.view(-1), x.contiguous().view(-1), group=group)
    return torch.cat([part.narrow(dim, 0, size) for part, size in zip(gathered, sizes, strict=True)], dim=dim)


@torch.compiler.disable
def all_reduce(x: Tensor, group: Group) -> Tensor:
    """Sum `x` over all ranks, in place."""
    count = group.size()
    sent_bytes["all_reduce"] += 2 * (count - 1) * x.nbytes // count
    dist.all_reduce(x, group=group)
    return x


def broadcast_text(text: str, device: torch.device) -> str:
    """Return rank 0's text on every rank."""
    own = list(text.encode()) if dist.get_rank() == 0 else []
    size = int(all_reduce(torch.tensor([len(own)], device=device), get_world_group()).item())
    letters = torch.zeros(size, dtype=torch.int32, device=device)
    letters[: len(own)] = torch.tensor(own, dtype=torch.int32, device=device)
    return bytes(all_reduce(letters, get_world_group()).tolist()).decode() if size else ""


def gather_texts(text: str, group: Group, device: torch.device) -> list[str]:
    """Return the texts of all ranks of the group, on every rank."""
    own = torch.tensor(list(text.encode()), dtype=torch.uint8, device=device)
    sizes = all_gather(torch.tensor([len(own)], device=device), 0, [1] * group.size(), group).tolist()
    if not any(sizes):
        return [""] * len(sizes)
    parts = all_gather(own, 0, sizes, group).cpu().split(sizes)
    return [bytes(part.tolist()).decode() for part in parts]


class RingExchange:
    """Sends tensors to the next rank of a ring and receives the previous rank's; the caller computes meanwhile."""

    def __init__(self, outgoing: Sequence[Tensor], incoming: Sequence[Tensor], group: Group) -> None:
        rank, count = group.rank(), group.size()
        following = dist.get_global_rank(group, (rank + 1) % count)
        previous = dist.get_global_rank(group, (rank - 1) % count)
        sent_bytes["exchange"] += sum(x.nbytes for x in outgoing)
        self.incoming = list(incoming)
        self.outgoing = [x.contiguous() for x in outgoing]  # kept alive until they are sent
        sends = [dist.P2POp(dist.isend, x, following, group) for x in self.outgoing if x.numel()]
        receives = [dist.P2POp(dist.irecv, x, previous, group) for x in self.incoming if x.numel()]
        operations = sends + receives
        self.works = dist.batch_isend_irecv(operations) if operations else []

    def wait(self) -> list[Tensor]:
        """Wait for the exchange and return the received tensors."""
        for work in self.works:
            work.wait()
        return self.incoming
