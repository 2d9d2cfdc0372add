"""The state that the stages of one batch share. Closed: a stage can only set fields declared here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
from PIL import Image
from torch import Generator, Tensor

from hydrarun.models.layers.tokens import Grid
from hydrarun.pipeline.truncation import Readings


def declare_stage_field() -> Any:
    """Declare a field that a stage sets; `check_stages` checks that it is set before another stage reads it."""
    return field(default=None, metadata={"stage": True})


@dataclass(slots=True)
class State:
    """One batch: N pictures, videos or sounds of one size, drawn together.

    The first fields come from the request; a stage sets each `declare_stage_field`.
    """

    prompts: list[str]  # N
    negative_prompts: list[str] | None  # N; None: there is no negative prompt
    seeds: list[int]  # N
    input_images: list[Image.Image]  # RGB, or RGBA for models that draw alpha; the same for all N; empty: none
    height: int  # pixels; None: a stage takes it from the input image; always None for a sound
    width: int  # pixels
    num_frames: int | None  # None: a still picture
    num_inference_steps: int
    true_cfg_scale: float | None
    guidance_scale: float | None
    guidance_scale_2: float | None
    max_sequence_length: int | None  # tokens
    audio_start_in_s: float | None = None  # of a sound; None: 0
    audio_end_in_s: float | None = None  # None: the end of the longest sound that the model makes
    layers: int | None = None  # of a picture; None: not layered
    resolution: int | None = None  # side in pixels of a square with the picture's area
    strict_prompt: bool = False  # whether a prompt of which no text encoder reads all is refused
    #: by prompt, what its tokenizers pass on
    readings: Readings = field(default_factory=dict)
    captioned: bool = False  # whether any prompt of the request, also another rank's, is blank
    #: the text that replaces a blank prompt
    caption: str | None = declare_stage_field()
    #: {branch: arguments of the transformer's `embed` that depend on the prompt}
    conditioning: dict[str, dict[str, Any]] = declare_stage_field()
    #: [N], the scale that a guidance-distilled transformer takes as input; None: it takes none
    guidance: Tensor | None = declare_stage_field()
    #: as the transformer takes them: [N, S, C] (packed), [N, C, F, h, w], or for a sound [N, C, L]
    latents: Tensor = declare_stage_field()
    #: N generators that drew the latents; a scheduler that adds noise draws it from copies of them
    generators: list[Generator] = declare_stage_field()
    #: latent tokens: frames, rows, columns
    grid: Grid = declare_stage_field()
    #: packed latents of the input images, concatenated, [1, I, C], and the grid of each; None: there are no images
    image_latents: Tensor | None = declare_stage_field()
    image_grids: tuple[Grid, ...] = declare_stage_field()
    #: token ids from a prior model, one for each latent token, [N, S], and those of the input images, [1, I]
    prior_tokens: Tensor = declare_stage_field()
    image_prior_tokens: Tensor | None = declare_stage_field()
    #: channels that are concatenated to the latents', [1, C', F, h, w]
    condition_latents: Tensor = declare_stage_field()
    #: latents of a given first frame, [1, C, 1, h, w]; None: it is drawn like the others
    first_frame: Tensor | None = declare_stage_field()
    #: [steps], the scheduler's own values
    timesteps: Tensor = declare_stage_field()
    #: uint8 [N, F, H, W, 3], F is 1 for a still picture; layers uint8 [N, L, H, W, 4]; sounds int16
    #: [N, samples, channels]
    frames: np.ndarray = declare_stage_field()

    def select(self, items: Sequence[int]) -> State:
        """Return a batch of these items of a request, before its first stage."""
        negatives = self.negative_prompts
        return replace(
            self,
            prompts=[self.prompts[item] for item in items],
            negative_prompts=None if negatives is None else [negatives[item] for item in items],
            seeds=[self.seeds[item] for item in items],
        )

    @classmethod
    def request_fields(cls) -> frozenset[str]:
        """Return the fields that are set before the first stage."""
        return frozenset(f.name for f in fields(cls)) - cls.stage_fields()

    @classmethod
    def stage_fields(cls) -> frozenset[str]:
        """Return the fields that stages set."""
        return frozenset(f.name for f in fields(cls) if "stage" in f.metadata)
