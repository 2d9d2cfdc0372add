"""The transformers of a pipeline: one, or two experts of which each predicts its part of the noise levels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from hydrarun.transformer import Transformer

NAMES = HIGH_NOISE, LOW_NOISE = "transformer", "transformer_2"


class Experts:
    """Transformers by their checkpoint's names, and which one a step calls.

    `boundary` is the timestep (the scheduler's own value) from which on the first one predicts; below it the second
    does (Wan 2.2). None: there is one. With `swap`, only the one in use is on `device`; the other waits on the host.
    """

    def __init__(
        self,
        transformers: Mapping[str, Transformer],
        boundary: float | None = None,
        *,
        device: torch.device,
        swap: bool = False,
    ) -> None:
        self.transformers = dict(transformers)
        self.boundary = boundary
        self.device = device
        self.swap = swap

    def __iter__(self) -> Iterator[Transformer]:
        return iter(self.transformers.values())

    @property
    def config(self) -> Mapping[str, object]:
        """The first one's config.json: what they share."""
        return self.transformers[HIGH_NOISE].config

    def name_at(self, timestep: float) -> str:
        """Whose step it is."""
        return HIGH_NOISE if self.boundary is None or timestep >= self.boundary else LOW_NOISE

    def ready(self, name: str) -> Transformer:
        """The transformer of that name, on the device."""
        if self.swap:
            for other, transformer in self.transformers.items():
                if other != name:
                    transformer.to("cpu")
            self.transformers[name].to(self.device)
        return self.transformers[name]


def boundary(pipeline: Any) -> float | None:
    """The timestep at which the experts change places, or None where the checkpoint has one transformer."""
    ratio = pipeline.config.get("boundary_ratio")
    return None if ratio is None else ratio * pipeline.scheduler.config.num_train_timesteps
