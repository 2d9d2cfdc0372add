"""Weights are in host memory only once, also during loading."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.helpers.paths import environment

#: allowance for each thread's staging buffers and what the allocator keeps of them
BESIDE = 16 * 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux' record of a process")
def test_no_second_copy_in_the_hosts_memory(tmp_path):
    """Holds if the file has the parameters' dtype (read directly into them) and if it has another dtype."""
    command = [sys.executable, "-m", "tests.helpers.peak", tmp_path]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert set(found) == {"BF16", "F32", "encoder BF16", "encoder F32"}
    for kind, measured in found.items():
        assert measured["stays"] > 150 * 2**20
        # lower bound: checks that something was measured; part of it is memory that the process had freed before
        assert 0.7 * measured["stays"] < measured["peak"] <= 1.1 * measured["stays"] + BESIDE, kind
