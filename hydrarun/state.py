"""What the stages of one batch talk through. Closed: a stage can only set what is declared here."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

Grid = tuple[int, int, int]


def given_by_stage() -> Any:
    """A field that is there once its stage has run; the check of the chain of stages sees to the order."""
    return field(default=None, metadata={"stage": True})


@dataclass(slots=True)
class State:
    """One batch: N pictures or videos of one size, drawn together.

    The fields without a default come from the request; each of the others is given by a stage.
    """

    prompts: list[str]  # N
    negative_prompts: list[str] | None  # N; None: there is no negative prompt
    seeds: list[int]  # N
    input_images: list[Image.Image]  # RGB; the same for all N; empty: there are none
    height: int  # pixels; None in a request: a stage takes it from the input image
    width: int  # pixels
    num_frames: int | None  # None: a still picture
    num_inference_steps: int
    true_cfg_scale: float | None
    guidance_scale: float | None
    guidance_scale_2: float | None
    max_sequence_length: int | None  # tokens
    #: {branch: what of the prompt the transformer's `embed` takes}
    conditioning: dict[str, dict[str, Any]] = given_by_stage()
    #: [N], the scale that a guidance-distilled transformer takes; None: it takes none
    guidance: Tensor | None = given_by_stage()
    #: [N, S, C], packed, or [N, C, F, h, w], as the transformer takes them
    latents: Tensor = given_by_stage()
    #: latent tokens: frames, rows, columns
    grid: Grid = given_by_stage()
    #: the input images as packed latents, one after the other, [1, I, C], and the grid of each; None: there are none
    image_latents: Tensor | None = given_by_stage()
    image_grids: tuple[Grid, ...] = given_by_stage()
    #: what a prior model drew before, the id of its token for each latent token, [N, S]; of the input images, [1, I]
    prior_tokens: Tensor = given_by_stage()
    image_prior_tokens: Tensor | None = given_by_stage()
    #: more channels beside the latents', [1, C', F, h, w]
    condition_latents: Tensor = given_by_stage()
    #: latents of a given first frame, [1, C, 1, h, w]; None: it is drawn like the others
    first_frame: Tensor | None = given_by_stage()
    #: [steps], the scheduler's own values
    timesteps: Tensor = given_by_stage()
    #: [N, F, H, W, 3] uint8; F is 1 for a still picture
    frames: np.ndarray = given_by_stage()

    @classmethod
    def request_fields(cls) -> frozenset[str]:
        """What is there before the first stage."""
        return frozenset(f.name for f in fields(cls)) - cls.stage_fields()

    @classmethod
    def stage_fields(cls) -> frozenset[str]:
        """What stages give."""
        return frozenset(f.name for f in fields(cls) if "stage" in f.metadata)
