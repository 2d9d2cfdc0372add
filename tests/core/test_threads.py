"""The thread pool: jobs are completed, and their errors are raised."""

from __future__ import annotations

import time

import pytest

from hydrarun.core import threads as pool
from hydrarun.core.distributed.rank import rank_info
from hydrarun.core.threads import ThreadPool


def fail(words: str) -> None:
    raise ValueError(words)


def test_leaving_waits_for_all():
    done = []
    with ThreadPool() as threads:
        for number in range(100):
            threads.start(done.append, number)
    assert sorted(done) == list(range(100))


@pytest.mark.parametrize("inside", [False, True])
def test_after_an_error_what_has_not_begun_is_left_undone(monkeypatch, inside):
    """An error in a job, or in the block itself."""
    monkeypatch.setattr(pool, "MAX_THREADS", 1)
    begun = []

    def block() -> None:
        with ThreadPool() as threads:
            if not inside:
                threads.start(fail, "first")
            threads.start(time.sleep, 0.2)
            threads.start(begun.append, "after it")
            threads.start(fail, "second")
            if inside:
                raise ValueError("first")

    with pytest.raises(ValueError, match="first"):
        block()
    assert begun == []


@pytest.mark.parametrize(("ranks", "threads"), [(None, 8), (1, 8), (4, 6), (24, 1), (48, 1)])
def test_a_rank_has_its_share_of_the_cores(monkeypatch, ranks, threads):
    """Of 24 cores, at most 8."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(24))
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}.items():
        if ranks is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, str(value))
    assert rank_info().local_size == (ranks or 1)
    assert ThreadPool().threads == threads
