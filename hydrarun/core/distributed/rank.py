"""The rank of this process, read from its environment variables."""

from __future__ import annotations

import os
from typing import NamedTuple


class RankInfo(NamedTuple):
    """The rank of this process and the number of ranks, in total and on this machine."""

    rank: int
    size: int
    local_rank: int
    local_size: int


def is_rank() -> bool:
    """Return whether torchrun, or the driver of a group, started this process as a rank."""
    return {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys()


def rank_info() -> RankInfo:
    """Return this process's rank info; a process that is not a rank counts as the only one."""
    if not is_rank():
        return RankInfo(0, 1, 0, 1)
    rank, size, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    return RankInfo(rank, size, local_rank, int(os.environ.get("LOCAL_WORLD_SIZE", size)))


def count_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_per_rank(ranks: int) -> int:
    """Return the number of threads for each of `ranks` processes on this machine."""
    return max(1, count_cores() // ranks)
