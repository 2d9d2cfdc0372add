"""Which rank is named as the cause of a failure, by what the ranks said and how they ended."""

from __future__ import annotations

import errno
import io
import os
import signal
from pathlib import Path

import pytest

from hydrarun.core.errors import RunError, UsageError
from hydrarun.engine.ranks import local_group
from hydrarun.engine.ranks.failure import MAX_TEXT, RankFailure, describe_failure
from tests.helpers import other_user

LOST = RuntimeError("Connection reset by peer")
ABORT, KILL, SEGV = -signal.SIGABRT, -signal.SIGKILL, -signal.SIGSEGV


@pytest.mark.parametrize(
    ("said", "ended", "expected"),
    [
        ({0: (2, LOST)}, {1: ABORT, 0: 1}, RunError("rank 1 was killed (signal 6)\n  last words of 1")),
        ({0: (2, LOST)}, {0: 1, 1: ABORT}, RunError("rank 1 was killed (signal 6)\n  last words of 1")),
        ({0: (2, LOST)}, {0: 1, 1: KILL}, RunError("rank 1 was killed (signal 9)\n  last words of 1")),
        ({0: (2, OSError("gone"))}, {0: 1, 1: 3}, RunError("rank 1 ended with exit code 3\n  last words of 1")),
        ({0: (2, LOST), 2: (1, LOST)}, {0: 1, 1: 0}, RunError("rank 1 ended with exit code 0\n  last words of 1")),
        ({}, {0: ABORT, 2: ABORT, 1: SEGV}, RunError("rank 1 was killed (signal 11)\n  last words of 1")),
        ({}, {2: ABORT, 0: ABORT}, RunError("rank 2 was killed (signal 6)\n  last words of 2")),
        ({1: (1, UsageError("a"))}, {1: 2, 0: ABORT}, UsageError("a")),  # NCCL aborts who has lost another
        ({1: (1, ZeroDivisionError("a"))}, {0: ABORT, 1: 1}, RunError("rank 1: ZeroDivisionError: a")),
        ({0: (2, LOST), 1: (3, RunError("a"))}, {2: ABORT}, RunError("a")),
        ({1: (1, RunError("a"))}, {1: 1, 0: KILL}, RunError("rank 0 was killed (signal 9)\n  last words of 0")),
        ({0: (2.5, LOST), 1: (2.25, RunError("a"))}, {0: 1, 1: 1}, RunError("a")),
        ({0: (2.5, RunError("b")), 1: (2.25, LOST)}, {}, RunError("rank 1: RuntimeError: Connection reset by peer")),
    ],
)  # fmt: skip
def test_who_left_without_a_word_is_the_cause(said, ended, expected):
    group = object.__new__(local_group.RankGroup)
    group.logs = [io.BytesIO(f"last words of {rank}\n".encode()) for rank in range(3)]
    group.failures = {rank: describe_failure(rank, *one) for rank, one in said.items()}
    group.ended = ended
    found = group._find_cause()
    assert (type(found), str(found)) == (type(expected), "\n".join(expected.args))


def test_a_failure_travels_as_json():
    try:
        raise ZeroDivisionError("x" * 2 * MAX_TEXT)
    except ZeroDivisionError as error:
        failure = describe_failure(3, 1.5, error)
    assert len(failure.text) == MAX_TEXT
    assert RankFailure(**failure.to_json()) == failure


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can become another user")
def test_other_users_reach_neither_jobs_nor_results_nor_the_rendezvous(monkeypatch):
    monkeypatch.setattr(local_group, "WORKER", "tests.helpers.idle_rank")
    group = local_group.RankGroup(2)
    try:
        rendezvous = Path(group.folder.name, "rendezvous")
        rendezvous.touch()
        pids = [os.getpid(), *(process.pid for process in group.processes)]
        paths = [group.folder.name, str(rendezvous), *(f"/proc/{pid}/fd" for pid in pids)]
        assert other_user.try_to_open(paths) == [0] * len(paths)
        assert other_user.try_to_open(paths, other_user.NOBODY) == [errno.EACCES] * len(paths)
        assert [other_user.list_listening_ports(pid) for pid in pids] == [[], [], []]
    finally:
        group.kill()
    assert not rendezvous.parent.exists()


def test_ranks_that_cannot_all_be_started_are_ended(monkeypatch, tmp_path):
    """For example because there are too many processes already."""
    started = []
    start = local_group.subprocess.Popen

    def popen(words, **options):
        if started:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        started.append(start(["sleep", "60"], start_new_session=True))
        return started[0]

    monkeypatch.setattr(local_group.subprocess, "Popen", popen)
    monkeypatch.setattr(local_group.tempfile, "tempdir", str(tmp_path))
    with pytest.raises(RunError, match="parallel: rank 1 cannot be started: Resource temporarily unavailable"):
        local_group.RankGroup(2)
    assert started[0].poll() == KILL
    assert list(tmp_path.iterdir()) == []
