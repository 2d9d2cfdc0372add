"""A rank that is killed in the middle of denoising: the command ends, names it, and leaves nothing half-written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SECONDS = 10  # all must have ended after this
START = 120  # timeout for the start of denoising, on a busy machine


def rank_process(driver: int, rank: int) -> int:
    """The process of a rank, among the driver's children."""
    children = Path(f"/proc/{driver}/task/{driver}/children").read_text().split()
    for child in map(int, children):
        if f"RANK={rank}" in Path(f"/proc/{child}/environ").read_text().split("\0"):
            return child
    raise AssertionError(f"rank {rank} is not there")


@pytest.mark.skipif(sys.platform != "linux", reason="finds the rank in /proc")
def test_a_rank_killed_while_denoising(tmp_path):
    log = tmp_path / "log"
    folder = tmp_path / "run"
    command = ["-m", "hydrarun", "parallel=cfg2", "device=cpu", "sampling.num_inference_steps=100000"]
    with open(log, "wb") as output:
        driver = subprocess.Popen([sys.executable, *command, f"hydra.run.dir={folder}"], stderr=output)
        try:
            deadline = time.monotonic() + START
            while "denoising 1/" not in log.read_text() and time.monotonic() < deadline:
                time.sleep(0.05)
            others = [rank_process(driver.pid, rank) for rank in (0, 1)]
            os.kill(others[1], signal.SIGKILL)
            start = time.monotonic()
            code = driver.wait(SECONDS)
        finally:
            driver.kill()
    assert code == 1
    assert time.monotonic() - start < SECONDS
    assert "rank 1 was killed (signal 9)" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert not any(Path(f"/proc/{process}").exists() for process in others)
    assert not list(folder.glob("*.png"))
    assert not list(folder.glob(".*.tmp"))
