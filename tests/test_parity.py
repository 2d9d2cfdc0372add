"""Whole runs against diffusers' pipeline: same checkpoint, same seed, float32 on the CPU.

Final latents within 1e-4 and pixels within 1/255: rounding of another order of the same operations, and nothing else.
"""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch

LATENTS = 1e-4
PIXELS = 1  # of 255

SHORT, LONG = "a cat", "two dogs, one of them “asleep”, on a 红色 sofa (wide shot)"

CASES = {
    "plain": {},
    "guidance off at 1": {"true_cfg_scale": 1.0},
    "guidance off at 0": {"true_cfg_scale": 0.0},
    "odd tokens": {"height": 40, "width": 72},
    "tall": {"height": 136, "width": 24, "seed": 7},
    "unequal prompts": {"prompt": [SHORT, LONG], "seed": [3, 4]},
    "unequal prompts, guidance off": {"prompt": [LONG, SHORT], "seed": [3, 4], "true_cfg_scale": 1.0},
    "unequal negatives": {"prompt": [SHORT, LONG], "negative_prompt": [LONG, " "], "seed": [3, 4]},
    "truncated prompt": {"prompt": LONG, "max_sequence_length": 6},
    "two steps": {"num_inference_steps": 2},
    "many steps": {"num_inference_steps": 9},
}


def differences(pipeline, state) -> tuple[float, int]:
    latents = (tiny.reference(pipeline, state, "latent") - state.latents).abs().max().item()
    wanted = (tiny.reference(pipeline, state, "np") * 255).round().astype(np.int32)
    return latents, int(np.abs(wanted - state.images.astype(np.int32)).max())


@pytest.mark.parametrize("case", CASES)
def test_equals_diffusers(tiny_pipeline, tiny_runner, case):
    state = tiny.draw(tiny_runner, **CASES[case])
    latents, pixels = differences(tiny_pipeline, state)
    assert latents <= LATENTS
    assert pixels <= PIXELS


def test_cases_can_fail(tiny_pipeline, tiny_runner):
    """Another seed, scale or prompt is far outside the bounds: the comparison sees what it should."""
    state = tiny.draw(tiny_runner)
    for change in ({"seed": 1}, {"true_cfg_scale": 3.0}, {"prompt": LONG}):
        other = tiny.draw(tiny_runner, **change)
        assert (other.latents - state.latents).abs().max() > 100 * LATENTS, change


def test_batch_equals_singles(tiny_runner):
    """Pictures drawn together are those drawn alone, whatever the other prompts' lengths."""
    prompts, seeds = [SHORT, LONG, "x"], [5, 6, 7]
    batch = tiny.draw(tiny_runner, prompt=prompts, seed=seeds)
    for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        single = tiny.draw(tiny_runner, prompt=prompt, seed=seed)
        assert (single.latents[0] - batch.latents[index]).abs().max() <= LATENTS
        assert np.abs(single.images[0].astype(int) - batch.images[index].astype(int)).max() <= PIXELS


def test_several_images_of_several_prompts_equal_singles(tiny_runner):
    """diffusers repeats the padding masks in the wrong order here, so singles are the reference."""
    batch = tiny.draw(tiny_runner, prompt=[SHORT, LONG], seed=20, num_images_per_prompt=2)
    assert batch.seeds == [20, 21, 20, 21]
    for index in range(4):
        single = tiny.draw(tiny_runner, prompt=batch.prompts[index], seed=batch.seeds[index])
        assert (single.latents[0] - batch.latents[index]).abs().max() <= LATENTS


def test_half_precision_follows_the_reference(tiny_folder, tiny_runner):
    """bfloat16 keeps 8 bits: the same operations in the same precision stay close to diffusers' own bfloat16 run."""
    from diffusers import QwenImagePipeline

    pipeline = QwenImagePipeline.from_pretrained(tiny_folder, torch_dtype=torch.bfloat16)
    pipeline.set_progress_bar_config(disable=True)
    state = tiny.draw(tiny.runner(tiny_folder, "dtype=bfloat16"), num_inference_steps=2)
    exact = tiny.draw(tiny_runner, num_inference_steps=2)
    theirs = tiny.reference(pipeline, state, "latent").float()
    scale = exact.latents.abs().mean()
    assert (theirs - state.latents.float()).abs().mean() / scale < 0.03
    # and it is no further from the exact result than the reference is
    ours_off = (state.latents.float() - exact.latents).abs().mean()
    assert ours_off < 1.5 * (theirs - exact.latents).abs().mean()
