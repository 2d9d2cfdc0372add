"""Cache-DiT on several ranks decides as in one process."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hydrarun.config.checks.values import find_cfg_scale
from hydrarun.core.distributed.degrees import split_evenly, world_size
from tests.helpers import dbcache, parallel_runs
from tests.helpers.dbcache import node, record
from tests.helpers.subjects import CONFIGS, LONG, SHORT

#: thresholds within the distances of a run of 12 steps with unequal prompts: some steps are computed, some skipped
THRESHOLDS = {"demo": 0.13, "wan22_t2v_a14b": 0.6}
LAYOUTS = {
    "ulysses2": {"ulysses_degree": 2},
    "cfg2": {"cfg_degree": 2},
    "tp2": {"tensor_degree": 2},
    "data2": {"data_degree": 2},
    "hsdp2_ulysses2": {"hsdp_degree": 2, "ulysses_degree": 2},
    "cfg2_ulysses2": {"cfg_degree": 2, "ulysses_degree": 2},
}
CASES = [(layout, False) for layout in LAYOUTS] + [("ulysses2", True), ("cfg2_ulysses2", True)]


def unequal(subject) -> dict:
    """Two prompts of unequal length, and a number of tokens that is not divisible by the ranks."""
    return {
        "prompt": [SHORT, LONG],
        "negative_prompt": ["x", LONG],
        "seed": [3, 4],
        find_cfg_scale(CONFIGS[subject.name])[0]: 3.0,
        **subject.size(3, 5),
        "num_inference_steps": 12,
    }


@pytest.mark.sample(3)
@pytest.mark.parametrize("subject", list(THRESHOLDS), indirect=True)
@pytest.mark.parametrize(("layout", "prune"), CASES)
def test_ranks_decide_as_one_process(subject, layout, prune, pool):
    chosen, fields = LAYOUTS[layout], unequal(subject)
    cache = node(residual_diff_threshold=THRESHOLDS[subject.name], max_warmup_steps=1, prune=prune)
    want = subject.draw(cache=cache, **fields).latents.numpy()
    alone = record(subject)
    assert 0.3 < alone["blocks"]["run"] / alone["blocks"]["all"] < 0.95
    ranks = world_size(parallel_runs.degrees(**chosen))
    results = pool(ranks, dbcache.draw, subject.name, subject.folder, chosen, 0, fields, cache)
    data = chosen.get("data_degree", 1)
    for rank, (latents, found) in enumerate(results):
        share = rank // (ranks // data)
        own = want[sum(split_evenly(2, data)[:share]) :][: split_evenly(2, data)[share]]
        assert np.abs(latents - own).max() <= 1e-4
        assert {key: found[key] for key in ("steps", "blocks")} == {key: alone[key] for key in ("steps", "blocks")}
        for expert, branches in found["statistics"].items():
            for branch, statistics in branches.items():
                assert_close(statistics["residual_diffs"], alone["statistics"][expert][branch]["residual_diffs"])


def assert_close(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for step, value in ours.items():
        assert value == pytest.approx(theirs[step], rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ranks_measure_the_librarys_distance(dtype, pool):
    """Exact in bfloat16, where the library rounds to 8 bits; with shards of unequal length."""
    from cache_dit.caching.cache_contexts import CachedContextManager

    generator = torch.Generator().manual_seed(0)
    kept = torch.randn(2, 15, 8, generator=generator)
    now = (kept + 0.3 * torch.randn(kept.shape, generator=generator)).to(dtype)
    kept = kept.to(dtype)
    manager = CachedContextManager("alone")
    manager.set_context(manager.new_context(name="alone"))
    manager.mark_step_begin()
    assert manager.similarity(kept, now, threshold=0.5)
    (want,) = manager.get_residual_diffs().values()
    for found in pool(2, dbcache.distance, kept, now, [0, 9, 15]):
        assert found == pytest.approx(want, rel=1e-6 if dtype == torch.float32 else 0)
