"""Points that change the build: a process that builds twenty times keeps nothing of earlier builds."""

from __future__ import annotations

import gc
import re
import sys
from pathlib import Path

import pytest
import torch

from hydrarun.engine.ranks.worker import RankSession
from tests.helpers import tiny

#: bytes that allocators may keep after the first builds
KEPT = 16 * 2**20


@pytest.fixture
def unseen():
    """Exclude objects that exist already from `gc.get_objects`."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def live() -> tuple[int, int]:
    """Return the number of tensors made since `unseen`, and their bytes."""
    gc.collect()
    tensors = [one for one in gc.get_objects() if issubclass(type(one), torch.Tensor) and one.device.type != "meta"]
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}
    return len(tensors), sum(storages.values())


def resident() -> int:
    """Return the resident bytes of this process."""
    return int(re.search(r"VmRSS:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux' record of a process")
def test_twenty_builds_in_turns_leave_nothing(tiny_folder, unseen, tmp_path):
    """The dtype of the weights alternates. Caches that hook into the blocks must be freed too."""
    words = ["sampling.num_inference_steps=2", "cache=dbcache", "cache.max_warmup_steps=1"]
    configs = [tiny.config(tiny_folder, *words, *more) for more in (["vae.tiling=true"], ["dtype=bfloat16"])]
    session, counts, sizes, loads = RankSession(None), [], [], []
    for number in range(20):
        record = session.run_job("run", configs[number % 2], {"output_dir": str(tmp_path / str(number))})
        loads.append(record["timings"]["load_s"] > 0)
        counts.append(live())
        sizes.append(resident())
    assert all(loads)
    assert counts[2:] == [counts[2], counts[3]] * 9
    assert sizes[-1] - sizes[3] <= KEPT
    session.close()
    assert live()[0] < counts[2][0] / 10


@pytest.mark.sample(1)
@pytest.mark.parametrize("other", ["offload=layerwise", "quantization=int8_weight_only", "vae.tiling=true"])
def test_a_device_is_empty_after_each_build(fake, tiny_folder, other, tmp_path):
    words = ["sampling.num_inference_steps=2", "device=auto"]
    configs = [{**tiny.config(tiny_folder, *words, *more), "device": "fake"} for more in ([], [other])]
    session, held, closed = RankSession(None), [], []
    for number in range(4):
        session.run_job("run", configs[number % 2], {"output_dir": str(tmp_path / str(number))})
        held.append(fake.memory_allocated())
        session.close()
        closed.append(fake.memory_allocated())
    assert held[2:] == held[:2]
    assert closed == closed[:1] * 4  # position tables, which models keep for the last sizes
    assert closed[0] < min(held) / 20
