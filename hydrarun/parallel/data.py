"""Data parallel: each rank draws its share of the pictures."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from hydrarun.parallel.comm import all_gather
from hydrarun.parallel.degrees import shares
from hydrarun.parallel.mesh import Axis
from hydrarun.state import State


def own_items(state: State, axis: Axis) -> State:
    """This rank's part of a batch that is not yet drawn. Noise belongs to the seed, so that pictures stay the same."""
    counts = shares(len(state.prompts), axis.size)
    start = sum(counts[: axis.rank])
    here = slice(start, start + counts[axis.rank])
    negatives = state.negative_prompts
    return dataclasses.replace(
        state,
        prompts=state.prompts[here],
        negative_prompts=None if negatives is None else negatives[here],
        seeds=state.seeds[here],
    )


def all_frames(frames: np.ndarray, count: int, axis: Axis, device: torch.device) -> np.ndarray:
    """The frames `[N, F, H, W, 3]` of all `count` items, from each rank's own."""
    gathered = all_gather(torch.from_numpy(frames).to(device), 0, shares(count, axis.size), axis.group)
    return gathered.cpu().numpy()
