"""Weights are in the host's memory once, also while they are loaded."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.helpers.paths import environment

#: for each thread what is on its way, and what the allocator keeps of that
BESIDE = 16 * 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux' record of a process")
def test_no_second_copy_in_the_hosts_memory(tmp_path):
    """Whether the file has the parameters' dtype, and is read into them, or another one."""
    command = [sys.executable, "-m", "tests.helpers.peak", tmp_path]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert set(found) == {"BF16", "F32", "encoder BF16", "encoder F32"}
    for kind, measured in found.items():
        assert measured["stays"] > 150 * 2**20
        # from below: it was measured at all; some of it is memory that the process had let go of before
        assert 0.7 * measured["stays"] < measured["peak"] <= 1.1 * measured["stays"] + BESIDE, kind
