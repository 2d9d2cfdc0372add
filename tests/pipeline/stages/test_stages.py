"""Single stages, in addition to the parity tests of whole runs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from hydrarun.core.errors import UsageError
from hydrarun.pipeline.request import make_state
from hydrarun.pipeline.stages.timesteps import PrepareTimesteps, compute_shift
from tests.helpers import tiny


def test_shift_is_a_line_through_the_schedulers_two_points():
    config = FlowMatchEulerDiscreteScheduler(**tiny.SCHEDULER).config
    assert compute_shift(config, 256) == pytest.approx(0.5)
    assert compute_shift(config, 8192) == pytest.approx(0.9)
    assert compute_shift(config, (256 + 8192) // 2) == pytest.approx(0.7)


def test_a_schedulers_own_spacing_is_shifted_where_it_cannot_do_without(tiny_runner):
    """As in diffusers' Stable Diffusion 3 pipeline."""
    scheduler, reference = (FlowMatchEulerDiscreteScheduler(**tiny.SCHEDULER) for _ in range(2))
    state = make_state(tiny_runner.config["sampling"])
    state.grid = (1, 9, 7)
    parts = SimpleNamespace(pipeline=SimpleNamespace(scheduler=scheduler), device="cpu")
    PrepareTimesteps(sigmas="scheduler")(state, parts, None)
    reference.set_timesteps(4, mu=compute_shift(reference.config, 63))
    assert torch.equal(state.timesteps, reference.timesteps)


def test_a_schedule_that_cannot_be_is_refused(tiny_runner):
    """The reference divides by zero here and returns NaN."""
    with pytest.raises(UsageError, match="sampling.num_inference_steps=1: too few .* use 2 or more"):
        tiny_runner.generate(num_inference_steps=1)


@pytest.mark.parametrize(
    ("settings", "grid", "message"),
    [
        (
            {},
            (1, 2048, 2048),
            "the scheduler's noise levels are not finite: its shift is too large for 4194304 tokens",
        ),
        (
            {"max_image_seq_len": 256},
            (1, 4, 4),
            "FlowMatchEulerDiscreteScheduler has no such schedule .*: float division",
        ),
        ({"base_shift": None}, (1, 4, 4), "FlowMatchEulerDiscreteScheduler has no such schedule with the settings of"),
    ],
)
def test_settings_of_a_scheduler_that_give_no_schedule_are_one_line(settings, grid, message, tiny_runner):
    scheduler = FlowMatchEulerDiscreteScheduler(**{**tiny.SCHEDULER, **settings})
    state = make_state(tiny_runner.config["sampling"])
    state.grid = grid
    parts = SimpleNamespace(pipeline=SimpleNamespace(scheduler=scheduler), device="cpu")
    with pytest.raises(UsageError, match=f"^sampling.num_inference_steps=4: {message}") as caught:
        PrepareTimesteps()(state, parts, None)
    assert "\n" not in str(caught.value)


def test_another_scheduler_equals_diffusers_with_it(tiny_folder, tiny_pipeline):
    """A multistep scheduler, by `_target_`, against the reference pipeline with the same scheduler."""
    from diffusers import QwenImagePipeline, UniPCMultistepScheduler

    settings = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    written = ", ".join(f"{key}: {value}" for key, value in settings.items())
    runner = tiny.runner(tiny_folder, f"model.scheduler={{_target_: diffusers.UniPCMultistepScheduler, {written}}}")
    state = tiny.draw(runner, num_inference_steps=5)
    reference = QwenImagePipeline(**{**tiny_pipeline.components, "scheduler": UniPCMultistepScheduler(**settings)})
    reference.set_progress_bar_config(disable=True)
    assert (tiny.reference(reference, state, "latent") - state.latents).abs().max() <= 1e-4


def test_noise_belongs_to_the_seed_not_to_the_batch(tiny_runner):
    from hydrarun.pipeline.stages.latents import PrepareLatents

    def noise(seeds):
        state = make_state({**tiny_runner.config["sampling"], "seed": seeds})
        PrepareLatents()(state, tiny_runner.built.parts, None)
        return state.latents, state.grid

    both, grid = noise([3, 9])
    assert torch.equal(both[1:], noise([9])[0])
    assert grid == (1, 8, 8)
    # the reference draws [1, 1, C, h, w] from the generator and packs 2 x 2 patches
    drawn = torch.randn(1, 1, 4, 16, 16, generator=torch.Generator().manual_seed(9))
    packed = drawn.view(4, 8, 2, 8, 2).permute(1, 3, 0, 2, 4).reshape(64, 16)
    assert torch.equal(both[1], packed)


def test_equal_prompts_are_encoded_once(tiny_runner, monkeypatch):
    seen = []
    pipeline = tiny_runner.built.parts.pipeline
    original = pipeline.encode_prompt
    monkeypatch.setattr(pipeline, "encode_prompt", lambda **kw: (seen.append(kw["prompt"]), original(**kw))[1])
    tiny_runner.generate(prompt=["a", "b", "a"], num_inference_steps=2)
    assert seen == [["a", "b"], [" "]]
