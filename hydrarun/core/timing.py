"""Wall-clock times that include the device's work, not only its launch."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import torch
from torch._dynamo.callback import callback_handler

from hydrarun.core.device import synchronize


@dataclass
class Timings:
    """Seconds per phase and per denoising step. Compilation and warm-up are counted separately.

    On a GPU every reading waits until the launched work is done.
    """

    device: torch.device
    phases: dict[str, float] = field(default_factory=dict)
    steps: list[float] = field(default_factory=list)
    #: the current phase, or the phase that an exception ended
    running: str = ""
    compile: float = 0.0
    warmup: float = 0.0

    def now(self) -> float:
        """Return the time in seconds, minus compilation, after all launched work has finished."""
        synchronize(self.device)
        return time.perf_counter() - self.compile

    @contextmanager
    def watch_compiler(self) -> Iterator[None]:
        """Add the wall-clock time that torch.compile takes inside to `compile`; nested graphs count once."""
        started = 0.0

        def start(*_: object) -> None:
            nonlocal started
            started = time.perf_counter()

        def end(*_: object) -> None:
            self.compile += time.perf_counter() - started

        callback_handler.register_start_callback(start)
        callback_handler.register_end_callback(end)
        try:
            yield
        finally:
            with suppress(ValueError):  # a reset of the compiler removes them too
                callback_handler.remove_start_callback(start)
                callback_handler.remove_end_callback(end)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the duration of the block to the phase `name`."""
        start = self.now()
        self.running = name
        try:
            yield
        finally:
            self.phases[name] = self.phases.get(name, 0.0) + self.now() - start
