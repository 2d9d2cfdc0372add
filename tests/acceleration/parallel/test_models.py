"""One model of each sort in layouts of several dimensions: latents within 1e-4 of a single process, and its pictures.

The token counts are not divisible by the ranks (3 x 5 tokens per frame, prompts of unequal length), and there are 3
heads. tests/test_matrix.py tests each dimension alone on every model.
"""

from __future__ import annotations

import numpy as np
import pytest

from hydrarun.core.distributed.degrees import split_evenly, world_size
from tests.helpers import parallel_runs
from tests.helpers.matrix import request
from tests.helpers.subjects import CONFIGS, SORTS, apart

LATENTS = 1e-4

LAYOUTS = {
    "ulysses4": {"ulysses_degree": 4},
    "ring4": {"ring_degree": 4},
    "cfg2_ulysses2": {"cfg_degree": 2, "ulysses_degree": 2},
    "data2_cfg2": {"data_degree": 2, "cfg_degree": 2},
    "tp2_ulysses2": {"tensor_degree": 2, "ulysses_degree": 2},
    "tp2_hsdp2": {"tensor_degree": 2, "hsdp_degree": 2},
    "hsdp2_usp2x2": {"hsdp_degree": 2, "ring_degree": 2, "ulysses_degree": 2},  # two copies of two halves
}
CASES = [(name, layout) for name in SORTS for layout in LAYOUTS]


def asked(subject) -> tuple[int, dict]:
    """Return the number of input images, and the request."""
    return CONFIGS[subject.name]["model"]["input_images"][0], {**request(subject.name), **subject.size(3, 5)}


@pytest.fixture(scope="module")
def alone() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Latents and frames of the request in one process, by model."""
    return {}


def in_one_process(subject, alone) -> tuple[np.ndarray, np.ndarray]:
    if subject.name not in alone:
        images, fields = asked(subject)
        plain = subject.draw(images, **fields)
        alone[subject.name] = plain.latents.numpy(), plain.frames
    return alone[subject.name]


@pytest.mark.sample(9)
@pytest.mark.parametrize(("subject", "layout"), CASES, indirect=["subject"])
def test_equals_one_process(subject, layout, pool, alone):
    images, fields = asked(subject)
    want, pictures = in_one_process(subject, alone)
    chosen = LAYOUTS[layout]
    ranks = world_size(parallel_runs.degrees(**chosen))
    results = pool(ranks, parallel_runs.draw, subject.name, subject.folder, chosen, images, fields)
    data = chosen.get("data_degree", 1)
    for rank, (frames, latents, _) in enumerate(results):
        share = rank // (ranks // data)
        start = sum(split_evenly(2, data)[:share])
        own = want[start : start + split_evenly(2, data)[share]]
        assert latents.shape == own.shape
        assert np.abs(latents - own).max() <= LATENTS
        assert apart(frames, pictures) <= 1


@pytest.mark.sample(1)
@pytest.mark.parametrize("subject", ["flux_dev"], indirect=True)
@pytest.mark.parametrize(
    "layout", [{"ring_degree": 2}, {"tensor_degree": 2}, {"hsdp_degree": 2, "ulysses_degree": 2}], ids=str
)
def test_compiled_blocks_work_together(subject, layout, pool, alone):
    images, fields = asked(subject)
    want, _ = in_one_process(subject, alone)
    for latents in pool(2, parallel_runs.draw_compiled, subject.name, subject.folder, layout, images, fields):
        assert np.abs(latents - want).max() <= LATENTS
