"""Wall-clock times that count the device's work, not only its launch."""

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
    """Seconds by phase, and of each denoising step; compiling and a warm-up, which are in none of them, apart.

    On a GPU every reading waits until its work is done.
    """

    device: torch.device
    phases: dict[str, float] = field(default_factory=dict)
    steps: list[float] = field(default_factory=list)
    #: the phase that runs, or that was left by an exception
    running: str = ""
    compile: float = 0.0
    warmup: float = 0.0

    def now(self) -> float:
        """Seconds without those of compiling, after everything that was launched has finished."""
        synchronize(self.device)
        return time.perf_counter() - self.compile

    @contextmanager
    def watch_compiler(self) -> Iterator[None]:
        """Count what torch.compile takes inside: by the wall clock, and graphs within graphs once."""
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
            with suppress(ValueError):  # a reset of the compiler lets go of them too
                callback_handler.remove_start_callback(start)
                callback_handler.remove_end_callback(end)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time inside to the phase `name`."""
        start = self.now()
        self.running = name
        try:
            yield
        finally:
            self.phases[name] = self.phases.get(name, 0.0) + self.now() - start
