"""Data parallel: each rank draws its share of the pictures."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from hydrarun.core.distributed.collectives import all_gather, all_reduce
from hydrarun.core.distributed.degrees import shares
from hydrarun.core.distributed.mesh import Axis, Mesh
from hydrarun.pipeline.state import State


def own_items(state: State, axis: Axis) -> State:
    """This rank's part of a batch that is not yet drawn. Noise belongs to the seed, so that pictures stay the same.

    Of a batch with fewer items than ranks (the last of a list) some ranks draw the last item too, so that every rank is
    there when others wait for it.
    """
    counts = shares(drawn(len(state.prompts), axis), axis.size)
    start = sum(counts[: axis.rank])
    last = len(state.prompts) - 1
    here = [min(index, last) for index in range(start, start + counts[axis.rank])]
    negatives = state.negative_prompts
    return dataclasses.replace(
        state,
        prompts=[state.prompts[index] for index in here],
        negative_prompts=None if negatives is None else [negatives[index] for index in here],
        seeds=[state.seeds[index] for index in here],
    )


def first_ranks(x: torch.Tensor, mesh: Mesh | None) -> torch.Tensor:
    """Whole numbers as the first of those ranks has them that draw the same pictures.

    For what is sampled: a rounding apart, ranks could draw something else altogether.
    """
    for name, axis in mesh.axes.items() if mesh else ():
        if name != "data" and axis.size > 1:
            x = all_reduce(x * (axis.rank == 0), axis.group)
    return x


def drawn(count: int, axis: Axis) -> int:
    """How many are drawn for `count` items: at least one on each rank."""
    return max(count, axis.size)


def all_frames(frames: np.ndarray, count: int, axis: Axis, device: torch.device) -> np.ndarray:
    """The frames (`State.frames`) of all `count` items, from each rank's own."""
    counts = shares(drawn(count, axis), axis.size)
    bytes_ = torch.from_numpy(frames.view(np.uint8)).to(device)  # not every backend sends numbers of 16 bits
    return all_gather(bytes_, 0, counts, axis.group).cpu().numpy().view(frames.dtype)[:count]
