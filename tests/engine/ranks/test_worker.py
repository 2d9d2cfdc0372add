"""A rank whose driver has ended ends too, whatever it does at that moment."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from tests.helpers.paths import environment


def run_rank(script: str, **options) -> subprocess.Popen:
    script = f"from hydrarun.engine.ranks import worker; {script}; import time; time.sleep(60)"
    return subprocess.Popen([sys.executable, "-c", script], env=environment(), **options)


@pytest.mark.parametrize(("parent", "code"), [("os.getppid()", 7), ("1 + os.getppid()", 1)])
def test_a_rank_whose_driver_ended_before_it_could_watch_it(parent, code):
    assert run_rank(f"import os; worker.end_with_parent({parent}); os._exit(7)").wait(30) == code


def test_a_rank_at_work_whose_driver_has_ended():
    """The system's signal is not needed for it."""
    ours, theirs = socket.socketpair()
    number = theirs.fileno()
    script = f"import socket; worker.DriverLink(socket.socket(fileno={number})); print('at work', flush=True)"
    rank = run_rank(script, pass_fds=[number], stdout=subprocess.PIPE)
    theirs.close()
    try:
        assert rank.stdout.readline() == b"at work\n"
        ours.close()
        assert rank.wait(30) == 1
    finally:
        rank.kill()
