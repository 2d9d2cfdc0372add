"""Whole runs of every model against diffusers' pipeline: same checkpoint, same seed, float32 on the CPU.

Tolerances: 1e-4 for final latents, 1/255 for pixels, 1/1024 for sound samples. They cover the rounding of the same
operations in another order, nothing else.
"""

from __future__ import annotations

import inspect

import diffusers
import numpy as np
import pytest
import torch

from tests.helpers import tiny
from tests.helpers.checkpoints_prior import with_images_as_expected
from tests.helpers.subjects import FAMILIES, LONG, SHORT, VARIANTS, apart, cases, pictures

LATENTS = 1e-4

#: of options that differ from another in data alone, one case, and more in `make test-all`
EVERY_CASE = [(name, case) for name in FAMILIES for case in cases(name)]
EVERY_CASE += [(name, next(iter(cases(name)))) for name in VARIANTS]
EVERY_CASE += [pytest.param(name, case, marks=pytest.mark.full) for name in VARIANTS for case in list(cases(name))[1:5]]


def reference_pipeline(subject, state):
    """Return diffusers' pipeline. For models with optional input images, diffusers has a separate image class."""
    pipeline = subject.pipeline
    if state.input_images and hasattr(pipeline, "generate_prior_tokens"):
        return with_images_as_expected(pipeline)
    if state.input_images and "image" not in inspect.signature(pipeline.__call__).parameters:
        pipeline = diffusers.WanImageToVideoPipeline(**pipeline.components, expand_timesteps=True)
        pipeline.set_progress_bar_config(disable=True)
    return pipeline


def reference(pipeline, state) -> tuple[torch.Tensor, np.ndarray]:
    """Return final latents and output: 8-bit pixels [N, F, H, W, 3] or 16-bit samples [N, samples, channels]."""
    latents, drawn = tiny.reference_latents_and_pixels(pipeline, state)
    if state.input_images and pipeline.config.get("expand_timesteps"):  # the image is inserted after the loop
        latents = tiny.reference(pipeline, state, "latent")
    if drawn.ndim == 3:
        return latents, (drawn.clip(-1, 1) * 32767).round().astype(np.int16).transpose(0, 2, 1)
    drawn = (drawn * 255).round().astype(np.uint8)
    return latents, drawn if drawn.ndim == 5 else drawn[:, None]


@pytest.fixture(scope="module")
def drawn():
    """Our final state, cached: `drawn(subject, case)`."""
    states = {}

    def draw(subject, case):
        if (subject.name, case) not in states:
            states[subject.name, case] = subject.draw(**cases(subject.name)[case])
        return states[subject.name, case]

    return draw


@pytest.mark.sample(60)
@pytest.mark.parametrize(("subject", "case"), EVERY_CASE, indirect=["subject"])
def test_equals_diffusers(subject, case, drawn):
    state = drawn(subject, case)
    theirs, wanted = reference(reference_pipeline(subject, state), state)
    assert theirs.shape == state.latents.shape
    assert (theirs - state.latents).abs().max() <= LATENTS
    assert wanted.shape == state.frames.shape
    assert apart(wanted, state.frames) <= 1


@pytest.mark.sample(5)
@pytest.mark.parametrize("subject", FAMILIES, indirect=True)
def test_cases_can_fail(subject, drawn):
    """Each case's settings change the latents far beyond the tolerance, so the comparison can detect them."""
    plain = drawn(subject, "guided")
    others = {case: drawn(subject, case) for case in cases(subject.name)}
    others |= {"seed": subject.draw(seed=1), "prompt": subject.draw(prompt=LONG)}
    for case, other in others.items():
        if other.latents.shape == plain.latents.shape and case != "guided":
            assert (other.latents - plain.latents).abs().max() > 100 * LATENTS, case
    assert plain.latents.abs().mean() < 10  # not so large that the absolute tolerance is meaningless


@pytest.mark.sample(6)
@pytest.mark.parametrize("subject", FAMILIES, indirect=True)
def test_several_images_of_several_prompts_equal_singles(subject):
    """diffusers repeats the padding masks in the wrong order here, so singles are the reference."""
    batch = subject.draw(prompt=[SHORT, LONG], seed=20, num_images_per_prompt=2)
    assert batch.seeds == [20, 21, 20, 21]
    for index in (1, 2):
        single = subject.draw(prompt=batch.prompts[index], seed=batch.seeds[index])
        assert (single.latents[0] - batch.latents[index]).abs().max() <= LATENTS
        assert apart(single.frames[0], batch.frames[index]) <= 1


@pytest.mark.sample(5)
@pytest.mark.parametrize("subject", FAMILIES, indirect=True)
def test_half_precision_follows_the_reference(subject):
    """bfloat16 keeps 8 bits: the same operations in the same precision stay close to diffusers' own bfloat16 run."""
    from hydrarun.engine.runner import Runner

    half = Runner({**subject.runner.config, "dtype": "bfloat16"})
    least = subject.runner.config["model"]["input_images"][0]
    state = tiny.draw(half, pictures(least, half.config), num_inference_steps=3)
    kinds = {"default": torch.bfloat16, "vae": half.built.parts.pipeline.vae.dtype}
    ours = {name: one for name, one in subject.pipeline.components.items() if name.endswith("processor")}
    pipeline = type(subject.pipeline).from_pretrained(subject.folder, torch_dtype=kinds, **ours)
    pipeline.set_progress_bar_config(disable=True)
    theirs = tiny.reference(pipeline, state, "latent").float().view_as(state.latents)
    assert (theirs - state.latents.float()).abs().mean() / theirs.abs().mean() < 0.03
