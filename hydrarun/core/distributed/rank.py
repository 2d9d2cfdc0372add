"""Which of the ranks this process is, from its environment."""

from __future__ import annotations

import os
from typing import NamedTuple


class RankInfo(NamedTuple):
    """Where this process stands among the ranks, in all and on its machine."""

    rank: int
    size: int
    local_rank: int
    local_size: int


def is_rank() -> bool:
    """Whether torchrun, or the driver of a group, started this process as a rank."""
    return {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys()


def rank_info() -> RankInfo:
    """This process among the ranks; a process that is no rank is alone."""
    if not is_rank():
        return RankInfo(0, 1, 0, 1)
    rank, size, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    return RankInfo(rank, size, local_rank, int(os.environ.get("LOCAL_WORLD_SIZE", size)))


def threads_per_rank(ranks: int) -> int:
    """Threads for each of `ranks` processes on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // ranks)
