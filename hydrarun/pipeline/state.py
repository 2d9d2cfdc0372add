"""What the stages of one batch talk through. Closed: a stage can only set what is declared here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
from PIL import Image
from torch import Generator, Tensor

from hydrarun.models.layers.tokens import Grid


def declare_stage_field() -> Any:
    """A field that is there once its stage has run; the check of the chain of stages sees to the order."""
    return field(default=None, metadata={"stage": True})


@dataclass(slots=True)
class State:
    """One batch: N pictures, videos or sounds of one size, drawn together.

    The first fields come from the request; each of those that are `given_by_stage` is given by one.
    """

    prompts: list[str]  # N
    negative_prompts: list[str] | None  # N; None: there is no negative prompt
    seeds: list[int]  # N
    input_images: list[Image.Image]  # RGB, or RGBA for models that draw alpha; the same for all N; empty: none
    height: int  # pixels; None in a request: a stage takes it from the input image; None of a sound
    width: int  # pixels
    num_frames: int | None  # None: a still picture
    num_inference_steps: int
    true_cfg_scale: float | None
    guidance_scale: float | None
    guidance_scale_2: float | None
    max_sequence_length: int | None  # tokens
    audio_start_in_s: float | None = None  # of a sound
    audio_end_in_s: float | None = None  # None: at the end of the longest that the model makes
    layers: int | None = None  # of a picture; None: it has none
    resolution: int | None = None  # pixels of a side of a square that is as large as the picture
    captioned: bool = False  # whether any prompt of the request, also another rank's, is blank
    #: what a blank prompt was taken for
    caption: str | None = declare_stage_field()
    #: {branch: what of the prompt the transformer's `embed` takes}
    conditioning: dict[str, dict[str, Any]] = declare_stage_field()
    #: [N], the scale that a guidance-distilled transformer takes; None: it takes none
    guidance: Tensor | None = declare_stage_field()
    #: [N, S, C], packed, or [N, C, F, h, w], or of a sound [N, C, L], as the transformer takes them
    latents: Tensor = declare_stage_field()
    #: N, what the latents were drawn from; a scheduler that adds noise draws it from them
    generators: list[Generator] = declare_stage_field()
    #: latent tokens: frames, rows, columns
    grid: Grid = declare_stage_field()
    #: the input images as packed latents, one after the other, [1, I, C], and the grid of each; None: there are none
    image_latents: Tensor | None = declare_stage_field()
    image_grids: tuple[Grid, ...] = declare_stage_field()
    #: what a prior model drew before, the id of its token for each latent token, [N, S]; of the input images, [1, I]
    prior_tokens: Tensor = declare_stage_field()
    image_prior_tokens: Tensor | None = declare_stage_field()
    #: more channels beside the latents', [1, C', F, h, w]
    condition_latents: Tensor = declare_stage_field()
    #: latents of a given first frame, [1, C, 1, h, w]; None: it is drawn like the others
    first_frame: Tensor | None = declare_stage_field()
    #: [steps], the scheduler's own values
    timesteps: Tensor = declare_stage_field()
    #: [N, F, H, W, 3] uint8, F is 1 for a still picture; of layers [N, L, H, W, 4]; of sounds int16
    #: [N, samples, channels]
    frames: np.ndarray = declare_stage_field()

    def select(self, items: Sequence[int]) -> State:
        """A batch of these items of a request, before its first stage."""
        negatives = self.negative_prompts
        return replace(
            self,
            prompts=[self.prompts[item] for item in items],
            negative_prompts=None if negatives is None else [negatives[item] for item in items],
            seeds=[self.seeds[item] for item in items],
        )

    @classmethod
    def request_fields(cls) -> frozenset[str]:
        """What is there before the first stage."""
        return frozenset(f.name for f in fields(cls)) - cls.stage_fields()

    @classmethod
    def stage_fields(cls) -> frozenset[str]:
        """What stages give."""
        return frozenset(f.name for f in fields(cls) if "stage" in f.metadata)
