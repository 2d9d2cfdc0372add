"""What the stages of one batch talk through. Closed: a stage can only set what is declared here."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from torch import Tensor


def given_by_stage() -> Any:
    """A field that is there once its stage has run; the check of the chain of stages sees to the order."""
    return field(default=None)


@dataclass(slots=True)
class State:
    """One batch: N pictures of one size, drawn together.

    The fields without a default come from the request; each of the others is given by a stage.
    """

    prompts: list[str]  # N
    negative_prompts: list[str] | None  # N; None: there is no negative prompt
    seeds: list[int]  # N
    height: int  # pixels
    width: int  # pixels
    num_inference_steps: int
    true_cfg_scale: float
    guidance_scale: float | None
    max_sequence_length: int  # tokens
    #: {branch: what the transformer's `embed` takes beside latents and timestep}
    conditioning: dict[str, dict[str, Any]] = given_by_stage()
    #: [N, S, C], packed as the transformer takes them
    latents: Tensor = given_by_stage()
    #: latent tokens: frames, rows, columns
    grid: tuple[int, int, int] = given_by_stage()
    #: [steps], the scheduler's own values
    timesteps: Tensor = given_by_stage()
    #: [N, H, W, 3] uint8
    images: np.ndarray = given_by_stage()

    @classmethod
    def request_fields(cls) -> frozenset[str]:
        """What is there before the first stage."""
        return frozenset(f.name for f in fields(cls)) - cls.stage_fields()

    @classmethod
    def stage_fields(cls) -> frozenset[str]:
        """What stages give."""
        return frozenset(f.name for f in fields(cls) if f.default is None)
