"""From the `sampling` section to the items of a batch. Values and counts were checked by `hydrarun.validate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from hydrarun.state import State

#: fields of `sampling` that the state holds under the same name
PLAIN = (
    "height",
    "width",
    "num_frames",
    "num_inference_steps",
    "true_cfg_scale",
    "guidance_scale",
    "guidance_scale_2",
    "max_sequence_length",
)


def make_state(sampling: dict[str, Any], input_images: Sequence[Image.Image] = ()) -> State:
    """One item per picture: prompt after prompt, and for each its pictures one after the other; all get the images.

    A whole number as seed: the k-th picture of every prompt gets `seed + k`. A list: one per picture.
    """
    prompts = as_list(sampling["prompt"])
    negatives = sampling["negative_prompt"]
    seeds = sampling["seed"]
    if isinstance(seeds, list):
        count = len(seeds) // len(prompts)
    else:
        count = sampling["num_images_per_prompt"] or 1
        seeds = [seeds + k for _ in prompts for k in range(count)]
    if negatives is not None and not isinstance(negatives, list):
        negatives = [negatives] * len(prompts)
    return State(
        prompts=[prompt for prompt in prompts for _ in range(count)],
        negative_prompts=None if negatives is None else [text for text in negatives for _ in range(count)],
        seeds=seeds,
        input_images=list(input_images),
        **{name: sampling[name] for name in PLAIN},
    )


def sampling_of(state: State) -> dict[str, Any]:
    """The section `sampling` that asks for this state's items."""
    items = {"prompt": state.prompts, "negative_prompt": state.negative_prompts, "seed": state.seeds}
    return {**items, "num_images_per_prompt": None, **{name: getattr(state, name) for name in PLAIN}}


def as_list(value: str | list[str]) -> list[str]:
    """A single text is a list of one."""
    return value if isinstance(value, list) else [value]
