"""Threads that work beside the caller."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from hydrarun.core.distributed.rank import rank_info, threads_per_rank

#: one alone reads gigabytes in a second, and each has memory of its own
MAX_THREADS = 8


class ThreadPool:
    """Jobs in threads: as many as this process has cores among the ranks of its machine.

    Leaving the block waits for the jobs and raises the first one's error, in the order in which they were given; after
    an error, in a job or in the block, what has not begun is left undone.
    """

    def __init__(self) -> None:
        self.threads = min(MAX_THREADS, threads_per_rank(rank_info().local_size))
        self.executor = ThreadPoolExecutor(self.threads)
        self.jobs: list[Future[Any]] = []

    def start(self, job: Callable[..., Any], *arguments: Any) -> None:
        """Do `job(*arguments)` in a thread as soon as one is free."""
        self.jobs.append(self.executor.submit(job, *arguments))

    def __enter__(self) -> ThreadPool:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        try:
            if error is None:
                for job in self.jobs:
                    job.result()
        finally:
            self.executor.shutdown(cancel_futures=True)
