"""From the `sampling` section to the items of a batch. Values and counts were checked by `hydrarun.validate`."""

from __future__ import annotations

from typing import Any

from hydrarun.state import State


def make_state(sampling: dict[str, Any]) -> State:
    """One item per picture: prompt after prompt, and for each its pictures one after the other.

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
        height=sampling["height"],
        width=sampling["width"],
        num_inference_steps=sampling["num_inference_steps"],
        true_cfg_scale=sampling["true_cfg_scale"],
        guidance_scale=sampling["guidance_scale"],
        max_sequence_length=sampling["max_sequence_length"],
    )


def as_list(value: str | list[str]) -> list[str]:
    """A single text is a list of one."""
    return value if isinstance(value, list) else [value]
