"""The transformers of a pipeline: one, or two experts of which each predicts its part of the noise levels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from hydrarun.models.transformer import Transformer

NAMES = HIGH_NOISE, LOW_NOISE = "transformer", "transformer_2"


class Experts:
    """Transformers by their checkpoint's names, and which one a step calls.

    `boundary` is the timestep (the scheduler's own value) from which on the first one predicts; below it the second
    does (Wan 2.2). None: there is one.
    """

    def __init__(self, transformers: Mapping[str, Transformer], boundary: float | None = None) -> None:
        self.transformers = dict(transformers)
        self.boundary = boundary

    def __getitem__(self, name: str) -> Transformer:
        return self.transformers[name]

    def __iter__(self) -> Iterator[Transformer]:
        return iter(self.transformers.values())

    @property
    def config(self) -> Mapping[str, object]:
        """The first one's config.json: what they share."""
        return self.transformers[HIGH_NOISE].config

    def name_at(self, timestep: float) -> str:
        """Whose step it is."""
        return HIGH_NOISE if self.boundary is None or timestep >= self.boundary else LOW_NOISE


def find_boundary(pipeline: Any) -> float | None:
    """The timestep at which the experts change places, or None where the checkpoint has one transformer."""
    ratio = pipeline.config.get("boundary_ratio")
    return None if ratio is None else ratio * pipeline.scheduler.config.num_train_timesteps
