"""A thread pool that works while the caller does."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from hydrarun.core.distributed.rank import rank_info, threads_per_rank

#: a single thread reads gigabytes per second, and each thread needs memory of its own
MAX_THREADS = 8


class ThreadPool:
    """Runs jobs in at most `MAX_THREADS` threads, one per core that this rank has on its machine.

    Leaving the block waits for the jobs and raises the error of the first failed job, in the order of submission. After
    an error, in a job or in the block, jobs that have not started are cancelled.
    """

    def __init__(self) -> None:
        self.threads = min(MAX_THREADS, threads_per_rank(rank_info().local_size))
        self.executor = ThreadPoolExecutor(self.threads)
        self.jobs: list[Future[Any]] = []

    def start(self, job: Callable[..., Any], *arguments: Any) -> None:
        """Run `job(*arguments)` in a thread as soon as one is free."""
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
