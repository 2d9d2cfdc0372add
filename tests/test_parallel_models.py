"""Models in layouts of several dimensions: the single process' latents within 1e-4, the same pictures within 1/255.

Sizes at which tokens do not divide (3 x 5 of them in a frame, prompts of unequal length), and 3 heads. Each dimension
by itself, on every model: tests/test_matrix.py.
"""

from __future__ import annotations

import numpy as np
import parallel_runs
import pytest
from matrix import request
from subjects import CONFIGS, MODELS, SORTS, VARIANTS

from hydrarun.parallel.degrees import shares, world_size

LATENTS, PIXELS = 1e-4, 1

LAYOUTS = {
    # two ranks
    "vae2_ulysses2": {"vae_degree": 2, "ulysses_degree": 2},
    "hsdp2_ulysses2": {"hsdp_degree": 2, "ulysses_degree": 2},
    # four
    "ulysses4": {"ulysses_degree": 4},
    "ring4": {"ring_degree": 4},
    "usp2x2": {"ring_degree": 2, "ulysses_degree": 2},
    "cfg2_ulysses2": {"cfg_degree": 2, "ulysses_degree": 2},
    "data2_cfg2": {"data_degree": 2, "cfg_degree": 2},
    "tp2_ulysses2": {"tensor_degree": 2, "ulysses_degree": 2},
    "tp2_hsdp2": {"tensor_degree": 2, "hsdp_degree": 2},
    "hsdp2_usp2x2": {"hsdp_degree": 2, "ring_degree": 2, "ulysses_degree": 2},  # two copies of two halves
}
#: what is not a sort of its own is tried in two
LAYOUTS_OF_OTHERS = ("cfg2_ulysses2", "hsdp2_usp2x2")
OTHERS = [name for name in MODELS if name not in {*SORTS, *VARIANTS}]
CASES = [(name, layout) for name in SORTS for layout in LAYOUTS]
CASES += [(name, layout) for name in OTHERS for layout in LAYOUTS_OF_OTHERS]


def asked(subject) -> tuple[int, dict]:
    """How many images, and what is asked for."""
    size = {"height": 3 * subject.multiple, "width": 5 * subject.multiple}
    return CONFIGS[subject.name]["model"]["input_images"][0], {**request(subject.name), **size}


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
        start = sum(shares(2, data)[:share])
        own = want[start : start + shares(2, data)[share]]
        assert latents.shape == own.shape
        assert np.abs(latents - own).max() <= LATENTS
        assert np.abs(frames.astype(int) - pictures.astype(int)).max() <= PIXELS


@pytest.mark.parametrize("subject", ["flux_dev", "wan22_ti2v_5b"], indirect=True)
@pytest.mark.parametrize("layout", [{"ring_degree": 2}, {"tensor_degree": 2}, LAYOUTS["hsdp2_ulysses2"]], ids=str)
def test_compiled_blocks_work_together(subject, layout, pool, alone):
    images, fields = asked(subject)
    want, _ = in_one_process(subject, alone)
    for latents in pool(2, parallel_runs.draw_compiled, subject.name, subject.folder, layout, images, fields):
        assert np.abs(latents - want).max() <= LATENTS
