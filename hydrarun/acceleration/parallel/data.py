"""Data parallel: each rank draws its share of the pictures."""

from __future__ import annotations

import numpy as np
import torch

from hydrarun.core.distributed.collectives import all_gather, all_reduce
from hydrarun.core.distributed.degrees import split_evenly
from hydrarun.core.distributed.mesh import Axis, Mesh


def find_own_indices(count: int, axis: Axis) -> list[int]:
    """Return which of `count` items this rank draws. Noise depends on the seed alone, so pictures stay the same.

    If a batch has fewer items than ranks (the last batch of a list), some ranks draw the last item too, so that every
    rank takes part in the collectives.
    """
    counts = split_evenly(count_drawn(count, axis), axis.size)
    start = sum(counts[: axis.rank])
    return [min(index, count - 1) for index in range(start, start + counts[axis.rank])]


def broadcast_ids(x: torch.Tensor, mesh: Mesh | None) -> torch.Tensor:
    """Broadcast the integers `x` from the first of the ranks that draw the same pictures.

    Needed for sampled tokens: rounding differences could make ranks sample different ones.
    """
    for name, axis in mesh.axes.items() if mesh else ():
        if name != "data" and axis.size > 1:
            x = all_reduce(x * (axis.rank == 0), axis.group)
    return x


def count_drawn(count: int, axis: Axis) -> int:
    """Return how many items are drawn for `count`: at least one on each rank."""
    return max(count, axis.size)


def gather_frames(frames: np.ndarray, count: int, axis: Axis, device: torch.device) -> np.ndarray:
    """Gather the frames (`State.frames`) of all `count` items from all ranks."""
    counts = split_evenly(count_drawn(count, axis), axis.size)
    bytes_ = torch.from_numpy(frames.view(np.uint8)).to(device)  # not every backend sends 16-bit numbers
    return all_gather(bytes_, 0, counts, axis.group).cpu().numpy().view(frames.dtype)[:count]
