"""CFG-parallel: the branches of guidance run on different ranks (xDiT, https://arxiv.org/abs/2411.01738)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from hydrarun.core.distributed.collectives import all_gather
from hydrarun.core.distributed.degrees import split_evenly
from hydrarun.core.distributed.mesh import Axis


def predict_branches(
    branches: Sequence[str],
    predict: Callable[[Sequence[str]], Mapping[str, Tensor]],
    axis: Axis | None,
    like: Tensor,
) -> Mapping[str, Tensor]:
    """Return `{branch: prediction}` of all branches on every rank; each rank predicts its share.

    `like` has a prediction's shape and dtype. Bytes sent by a rank: its predictions, padded to the largest share, to
    each other rank.
    """
    if axis is None:
        return predict(branches)
    counts = split_evenly(len(branches), axis.size)
    start = sum(counts[: axis.rank])
    mine = predict(branches[start : start + counts[axis.rank]])
    stacked = torch.stack([*mine.values()]) if mine else like.new_empty(0, *like.shape)
    return dict(zip(branches, all_gather(stacked, 0, counts, axis.group).unbind(0), strict=True))
