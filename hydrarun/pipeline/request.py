"""Turns the `sampling` section into the items of a batch. `config.checks.values` has checked its values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from hydrarun.config.batches import expand_prompts
from hydrarun.pipeline.state import State

#: fields of `sampling` that `State` holds under the same name
PLAIN = (
    "height",
    "width",
    "num_frames",
    "layers",
    "resolution",
    "num_inference_steps",
    "true_cfg_scale",
    "guidance_scale",
    "guidance_scale_2",
    "max_sequence_length",
    "audio_start_in_s",
    "audio_end_in_s",
)


def make_state(sampling: dict[str, Any], input_images: Sequence[Image.Image] = ()) -> State:
    """Return a state with one item per picture (`hydrarun.config.batches.expand_prompts`); all share the images."""
    prompts, negatives, seeds = map(list, zip(*expand_prompts(sampling), strict=True))
    return State(
        prompts=prompts,
        negative_prompts=None if sampling["negative_prompt"] is None else negatives,
        seeds=seeds,
        input_images=list(input_images),
        captioned=not all(map(str.strip, prompts)),
        **{name: sampling[name] for name in PLAIN},
    )


def restore_sampling(state: State) -> dict[str, Any]:
    """Return the section `sampling` from which `make_state` makes this state's items."""
    items = {"prompt": state.prompts, "negative_prompt": state.negative_prompts, "seed": state.seeds}
    return {**items, "num_images_per_prompt": None, **{name: getattr(state, name) for name in PLAIN}}
