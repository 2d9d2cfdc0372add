"""Jobs and last messages between torchrun's ranks. Here the ranks are threads; `test_launch` runs torchrun itself."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import HashStore

from hydrarun.core.distributed.rank import RankInfo
from hydrarun.core.errors import RunError, UsageError
from hydrarun.engine.ranks import torchrun

LOST = RuntimeError("Connection closed by peer")


@pytest.fixture
def links(monkeypatch) -> list[torchrun.TorchrunLink]:
    """The links of three ranks."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setattr(torchrun, "GRACE", 0.5)
    here, store = threading.local(), HashStore()
    monkeypatch.setattr(torchrun, "rank_info", lambda: RankInfo(here.rank, 3, here.rank, 3))

    def build(rank: int) -> torchrun.TorchrunLink:
        here.rank = rank
        return torchrun.TorchrunLink(store)

    with ThreadPoolExecutor(3) as threads:
        return list(threads.map(build, range(3)))


def test_jobs_of_any_size_reach_all_ranks_and_all_may_leave(links):
    jobs = [{"action": "run", "prompt": "一只猫"}, {"prompt": "x" * 9 * 2**20}, None]
    with ThreadPoolExecutor(2) as threads:
        received = [threads.submit(lambda link: [link.receive_job() for _ in jobs], link) for link in links[1:]]
        for job in jobs:
            links[0].send_job(job)
        assert [one.result() for one in received] == [jobs, jobs]
        list(threads.map(torchrun.TorchrunLink.leave, links[1:]))
    assert links[0].receive_last_messages(5) == ([], [])


def test_the_first_failure_is_printed_by_its_rank_and_raised_by_rank_0(links):
    text = "猫" * 5000
    assert links[2].report_failure(UsageError(text)).text == text
    assert links[1].report_failure(LOST) is None
    found = links[0].find_first_failure(LOST)
    assert (found.rank, found.order, found.kind, found.text) == (2, 1, "UsageError", text)


def test_rank_0_fails_first(links):
    found = links[0].find_first_failure(RunError("NaN"))
    assert (found.rank, found.order, found.text) == (0, 1, "NaN")
    assert links[1].report_failure(UsageError("a")) is None


def test_a_rank_that_ends_without_a_message_is_named(links):
    assert links[1].report_failure(LOST).order == 1
    del links[2]  # closes its connections
    found = links[0].find_first_failure(LOST)
    assert (found.rank, found.order, found.text) == (
        2,
        0,
        "rank 2 ended without a message: torchrun reports its exit code",
    )
