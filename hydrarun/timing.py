"""Wall-clock times that count the device's work, not only its launch."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from hydrarun.memory.device import synchronize


@dataclass
class Timings:
    """Seconds by phase, and of each denoising step. On a GPU every reading waits until its work is done."""

    device: torch.device
    phases: dict[str, float] = field(default_factory=dict)
    steps: list[float] = field(default_factory=list)
    #: the phase that runs, or that was left by an exception
    running: str = ""

    def now(self) -> float:
        """Seconds, after everything that was launched has finished."""
        synchronize(self.device)
        return time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time inside to the phase `name`."""
        start = self.now()
        self.running = name
        try:
            yield
        finally:
            self.phases[name] = self.phases.get(name, 0.0) + self.now() - start
