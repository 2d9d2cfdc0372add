"""Every model in every layout of ranks: the single process' latents within 1e-4, the same pictures within 1/255.

Sizes at which tokens do not divide (3 x 5 of them in a frame, prompts of unequal length), and 3 heads.
"""

from __future__ import annotations

import numpy as np
import parallel_runs
import pytest
from subjects import CONFIGS, LONG, MODELS, SHORT, VARIANTS, apart

from hydrarun import listing
from hydrarun.media import kinds
from hydrarun.parallel.degrees import shares, world_size
from hydrarun.validate import cfg_scale

LATENTS = 1e-4

LAYOUTS = {
    # two ranks
    "ulysses2": {"ulysses_degree": 2},
    "ring2": {"ring_degree": 2},
    "cfg2": {"cfg_degree": 2},
    "data2": {"data_degree": 2},
    "tp2": {"tensor_degree": 2},
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
#: an option that is another's but for checkpoint and defaults is tried in two, as is the demo model, a Qwen-Image
FEWER = {*VARIANTS, "demo"}
LAYOUTS_OF_VARIANTS = ("tp2", "cfg2_ulysses2")
#: of a sound there is nothing for ranks to share in the VAE
SOUNDS = {name for name in MODELS if kinds.of_model(CONFIGS[name]) is kinds.SOUND}
CASES = [
    (name, layout)
    for name in MODELS
    for layout in (LAYOUTS_OF_VARIANTS if name in FEWER else LAYOUTS)
    if not (name in SOUNDS and "vae_degree" in LAYOUTS[layout])
]


def request(subject) -> tuple[int, dict]:
    """Two prompts of unequal length with guidance, and how many images."""
    config = CONFIGS[subject.name]
    fields = {
        "prompt": [SHORT, LONG],
        "negative_prompt": ["x", LONG],
        "seed": [3, 4],
        cfg_scale(config)[0]: 3.0,
        **subject.size(3, 5),
        "num_inference_steps": 2,  # with two experts, one for each
    }
    return config["model"]["input_images"][0], fields


@pytest.fixture(scope="module")
def alone() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Latents and frames of the request in one process, by model."""
    return {}


def in_one_process(subject, alone) -> tuple[np.ndarray, np.ndarray]:
    if subject.name not in alone:
        images, fields = request(subject)
        plain = subject.draw(images, **fields)
        alone[subject.name] = plain.latents.numpy(), plain.frames
    return alone[subject.name]


@pytest.mark.parametrize(("subject", "layout"), CASES, indirect=["subject"])
def test_equals_one_process(subject, layout, pool, alone):
    images, fields = request(subject)
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
        assert apart(frames, pictures) <= 1


@pytest.mark.parametrize("subject", ["flux_dev", "wan22_ti2v_5b"], indirect=True)
@pytest.mark.parametrize("layout", ["ring2", "tp2", "hsdp2_ulysses2"])
def test_compiled_blocks_work_together(subject, layout, pool, alone):
    images, fields = request(subject)
    want, _ = in_one_process(subject, alone)
    chosen = LAYOUTS[layout]
    for latents in pool(2, parallel_runs.draw_compiled, subject.name, subject.folder, chosen, images, fields):
        assert np.abs(latents - want).max() <= LATENTS


def test_what_the_table_of_models_says_was_run_here(models_table):
    """Each method that README's table gives a model is one of the layouts above, on that model."""
    tried = {name.removesuffix("_degree") for chosen in LAYOUTS.values() for name in chosen}
    assert tried == set(listing.METHODS)
    assert [row[0] for row in models_table.rows] == MODELS
    for row in models_table.rows:
        cells = dict(zip(models_table.header, row, strict=True))
        refused = {"vae"} if row[0] in SOUNDS else set()
        assert {name for name in listing.METHODS if cells[name] != "yes" and " > " not in cells[name]} == refused, row[
            0
        ]
