"""The transformers of a pipeline: one, or two experts that each predict a range of noise levels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from hydrarun.models.transformer import Transformer

NAMES = HIGH_NOISE, LOW_NOISE = "transformer", "transformer_2"


class Experts:
    """Transformers by their names in the checkpoint, and the choice of one for each step.

    `boundary` is a timestep (the scheduler's value): at or above it the first expert predicts, below it the second
    (Wan 2.2). None: there is one transformer.
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
        """Config of the first transformer, used for both experts."""
        return self.transformers[HIGH_NOISE].config

    def name_at(self, timestep: float) -> str:
        """Return the name of the expert that predicts at `timestep`."""
        return HIGH_NOISE if self.boundary is None or timestep >= self.boundary else LOW_NOISE


def find_boundary(pipeline: Any) -> float | None:
    """Return the timestep that separates the experts, or None for a checkpoint with one transformer."""
    ratio = pipeline.config.get("boundary_ratio")
    return None if ratio is None else ratio * pipeline.scheduler.config.num_train_timesteps
