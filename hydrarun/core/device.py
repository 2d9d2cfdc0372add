"""The device that a run computes on. torch has a module with the same functions for each kind of device."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hydrarun.core.errors import UsageError
from hydrarun.core.progress import Progress


def count_devices(device: torch.device) -> int:
    """Return the number of devices of this kind that torch sees."""
    return torch.get_device_module(device).device_count()


def synchronize(device: torch.device) -> None:
    """Wait until all launched work is done."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


def read_peak_bytes(device: torch.device) -> int:
    """Return this process's peak device memory since `reset_peak_bytes`; 0 for the CPU, which is the host."""
    return 0 if device.type == "cpu" else torch.get_device_module(device).max_memory_allocated(device)


def reset_peak_bytes(device: torch.device) -> None:
    """Reset the peak that `read_peak_bytes` returns."""
    if device.type != "cpu":
        torch.get_device_module(device).reset_peak_memory_stats(device)


def read_total_bytes(device: torch.device) -> int:
    """Return the total memory of the device; for the CPU, of the host."""
    if device.type == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return torch.get_device_module(device).mem_get_info(device)[1]


def empty_cache(device: torch.device) -> None:
    """Release memory that torch caches but does not use, so that large weights find a contiguous piece."""
    if device.type != "cpu":
        torch.get_device_module(device).empty_cache()


class CopyStream:
    """Copies tensors to the device on a separate stream, while the device computes.

    Copies and computation wait for each other by CUDA events. Other devices have no streams here: a copy is made at
    once, and every event is None.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def record_compute(self) -> Any:
        """Return an event that marks the end of all computation launched so far."""
        return None if self.stream is None else torch.cuda.current_stream(self.device).record_event()

    @contextmanager
    def copy_after(self, after: Any) -> Iterator[None]:
        """Make the copies inside after the event `after`, while the device computes."""
        if self.stream is None:
            yield
            return
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(after)
            yield

    def record_copy(self) -> Any:
        """Return an event that marks the end of all copies launched so far."""
        return None if self.stream is None else self.stream.record_event()

    def copy(self, source: Tensor, target: Tensor, after: Any) -> Any:
        """Copy after the event `after`, while the device computes; return the event that marks the end of the copy."""
        with self.copy_after(after):
            target.copy_(source, non_blocking=True)
        return self.record_copy()

    def wait(self, moment: Any) -> None:
        """Make all computation launched from now on wait for the event."""
        if moment is not None:
            torch.cuda.current_stream(self.device).wait_event(moment)


HOST = torch.device("cpu")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(name: str, progress: Progress) -> torch.device:
    """Return the device. `auto`: CUDA if available, else CPU, with a note. Raises `UsageError` for a missing device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        progress.note(f"device={name} (auto)")
    device = torch.device(name)
    seen = count_devices(device)
    if (device.index or 0) >= seen:
        kind = device.type.upper()
        raise UsageError(f"device={name}: torch sees {seen} {kind} devices here; use device=cpu or device=auto")
    return device


def choose_dtype(name: str, device: torch.device, progress: Progress) -> torch.dtype:
    """Return the dtype. `auto`: bfloat16 on CUDA, else float32, with a note."""
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
        progress.note(f"dtype={name} (auto)")
    return DTYPES[name]
