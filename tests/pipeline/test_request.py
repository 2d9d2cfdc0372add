"""From `sampling` to items: which prompt gets which seed."""

from __future__ import annotations

import pytest

from hydrarun.pipeline.request import make_state, restore_sampling

SAMPLING = {
    "prompt": "a",
    "negative_prompt": None,
    "num_inference_steps": 1,
    "true_cfg_scale": 1.0,
    "guidance_scale": None,
    "guidance_scale_2": None,
    "num_frames": None,
    "layers": None,
    "resolution": None,
    "height": 8,
    "width": 8,
    "seed": 7,
    "num_images_per_prompt": None,
    "max_sequence_length": 8,
    "audio_start_in_s": None,
    "audio_end_in_s": None,
}


@pytest.mark.parametrize(
    ("change", "prompts", "seeds"),
    [
        ({}, "a", [7]),
        ({"num_images_per_prompt": 3}, "aaa", [7, 8, 9]),
        ({"prompt": ["a", "b"]}, "ab", [7, 7]),
        ({"prompt": ["a", "b"], "num_images_per_prompt": 2}, "aabb", [7, 8, 7, 8]),
        ({"prompt": ["a", "b"], "seed": [4, 9]}, "ab", [4, 9]),
        ({"seed": [4, 9, 1]}, "aaa", [4, 9, 1]),
        ({"prompt": ["a", "b"], "seed": [1, 2, 3, 4]}, "aabb", [1, 2, 3, 4]),
        ({"seed": [4, 9], "num_images_per_prompt": 2}, "aa", [4, 9]),
    ],
)
def test_items(change, prompts, seeds):
    state = make_state({**SAMPLING, **change})
    assert "".join(state.prompts) == prompts
    assert state.seeds == seeds


def test_negative_prompts_follow_their_prompts():
    state = make_state({**SAMPLING, "prompt": ["a", "b"], "negative_prompt": ["x", "y"], "num_images_per_prompt": 2})
    assert state.negative_prompts == ["x", "x", "y", "y"]
    assert make_state({**SAMPLING, "prompt": ["a", "b"], "negative_prompt": "z"}).negative_prompts == ["z", "z"]
    assert make_state(SAMPLING).negative_prompts is None


def test_items_can_be_asked_for_again():
    change = {"prompt": ["a", "b"], "num_images_per_prompt": 2, "negative_prompt": "n"}
    state = make_state({**SAMPLING, **change})
    assert make_state(restore_sampling(state)) == state
    alone = make_state(SAMPLING)
    assert make_state(restore_sampling(alone)) == alone
