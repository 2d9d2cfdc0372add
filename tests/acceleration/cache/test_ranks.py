"""Caches on several ranks: one decision for all of them, and the pictures of one process."""

from __future__ import annotations

import numpy as np
import pytest

from hydrarun.acceleration.cache.step_cache import StepCache
from hydrarun.config.checks.values import find_cfg_scale
from hydrarun.core.distributed.degrees import split_evenly, world_size
from tests.helpers import parallel_runs
from tests.helpers.caches import mask, node
from tests.helpers.subjects import CONFIGS, LONG, SHORT

LATENTS = 1e-4  # as without a cache

LAYOUTS = {
    "ulysses2": {"ulysses_degree": 2},
    "cfg2": {"cfg_degree": 2},
    "tp2": {"tensor_degree": 2},
    "ring2": {"ring_degree": 2},
    "data2": {"data_degree": 2},
    "hsdp2_cfg2": {"hsdp_degree": 2, "cfg_degree": 2},
    "cfg2_ulysses2": {"cfg_degree": 2, "ulysses_degree": 2},
}
#: joint attention with two block lists, joint attention, cross attention with two experts
MODELS = ("flux_dev", "qwen_image", "wan22_t2v_a14b")
#: tried until some steps are computed and some are not
THRESHOLDS = (0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 2.5)
CACHES = {
    "teacache": [node("teacache", "taylor", threshold=value, last=0) for value in THRESHOLDS],
    "first_block": [node("first_block", threshold=value, last=0) for value in THRESHOLDS],
    "mask": [mask([0, 1, 2, 4], "taylor")],
}
#: every cache in some layouts, every layout with the gate that measures most
CASES = [("first_block", layout) for layout in LAYOUTS] + [
    (name, layout) for name in ("teacache", "mask") for layout in ("ulysses2", "cfg2", "tp2")
]


def request(subject) -> tuple[int, dict]:
    """Two prompts of unequal length with guidance, 3 x 5 tokens per frame, an odd number for two ranks."""
    config = CONFIGS[subject.name]
    return config["model"]["input_images"][0], {
        "prompt": [SHORT, LONG],
        "negative_prompt": ["x", LONG],
        "seed": [3, 4],
        find_cfg_scale(config)[0]: 3.0,
        **subject.size(3, 5),
        "num_inference_steps": 6,
    }


@pytest.fixture(scope="module")
def alone() -> dict[tuple[str, str], tuple[dict, np.ndarray, dict]]:
    """Cache, latents and record in one process, by model and cache's name."""
    return {}


def in_one_process(subject, name, alone):
    images, fields = request(subject)
    for cache in CACHES[name] if (subject.name, name) not in alone else ():
        latents = subject.draw(images, cache=cache, **fields).latents.numpy()
        record = subject.runner.built.parts.cache.record()
        alone[subject.name, name] = cache, latents, record
        if 1 <= skipped(record) <= 4:
            break
    return alone[subject.name, name]


def skipped(record) -> int:
    return sum(len(expert["positive"]["skipped"]) for expert in record["steps"].values())


@pytest.mark.sample(7)
@pytest.mark.parametrize("subject", MODELS, indirect=True)
@pytest.mark.parametrize(("name", "layout"), CASES)
def test_ranks_decide_as_one_and_draw_the_same(subject, name, layout, pool, alone):
    images, fields = request(subject)
    cache, want, record = in_one_process(subject, name, alone)
    assert 1 <= skipped(record) <= 4
    chosen = LAYOUTS[layout]
    ranks = world_size(parallel_runs.degrees(**chosen))
    results = pool(ranks, parallel_runs.draw_cached, subject.name, subject.folder, chosen, cache, images, fields)
    data = chosen.get("data_degree", 1)
    for rank, (latents, decided, _) in enumerate(results):
        share = rank // (ranks // data)
        start = sum(split_evenly(2, data)[:share])
        assert decided == record
        assert np.abs(latents - want[start : start + split_evenly(2, data)[share]]).max() <= LATENTS


@pytest.mark.parametrize("subject", ["qwen_image"], indirect=True)
def test_a_decision_costs_two_numbers_for_each_branch(subject, pool):
    """A planned gate sends nothing; Ulysses itself sends no all_reduce."""
    images, fields = request(subject)
    sent = {}
    for name in ("first_block", "mask"):
        results = pool(
            2,
            parallel_runs.draw_cached,
            subject.name,
            subject.folder,
            LAYOUTS["ulysses2"],
            CACHES[name][0],
            images,
            fields,
        )
        sent[name] = {bytes_sent for _, _, bytes_sent in results}
    assert sent["mask"] == {0}
    assert sent["first_block"] == {5 * 2 * 2 * 4}  # steps after the first, branches, numbers, bytes


@pytest.mark.parametrize("subject", ["qwen_image"], indirect=True)
def test_ranks_agree_at_a_threshold_that_the_change_just_reaches(subject, pool, monkeypatch):
    """Sums over a rank's own tokens alone would fall on both sides of the threshold."""
    images, fields = request(subject)
    seen: list[float] = []
    measure = StepCache.changes

    def noting(self, signals, step):
        found = measure(self, signals, step)
        seen.append(max(found.values()))
        return found

    with monkeypatch.context() as patch:
        patch.setattr(StepCache, "changes", noting)
        subject.draw(images, cache=node("first_block", threshold=0.0, last=0), **fields)
    assert len(seen) == 5
    for threshold in seen:
        cache = node("first_block", threshold=threshold, last=0)
        one, other = pool(
            2, parallel_runs.draw_cached, subject.name, subject.folder, LAYOUTS["ulysses2"], cache, images, fields
        )
        assert one[1] == other[1]
