"""The device that a run computes on, whatever its kind: torch has the same functions in a module of each."""

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
    """How many devices of this kind torch sees."""
    return torch.get_device_module(device).device_count()


def synchronize(device: torch.device) -> None:
    """Wait until all that was launched is done."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


def read_peak_bytes(device: torch.device) -> int:
    """The most that this process held on the device since `forget_peak`; 0 for the CPU, which is the host."""
    return 0 if device.type == "cpu" else torch.get_device_module(device).max_memory_allocated(device)


def reset_peak_bytes(device: torch.device) -> None:
    """From here on count anew what is the most."""
    if device.type != "cpu":
        torch.get_device_module(device).reset_peak_memory_stats(device)


def read_total_bytes(device: torch.device) -> int:
    """The memory of the device; of the CPU the host's."""
    if device.type == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return torch.get_device_module(device).mem_get_info(device)[1]


def empty_cache(device: torch.device) -> None:
    """Give back what torch holds and nothing uses, so that large weights find room in one piece."""
    if device.type != "cpu":
        torch.get_device_module(device).empty_cache()


class CopyStream:
    """Copies to the device that are made while it computes, in a stream of their own.

    A moment is a point in what was launched (an event). Devices other than CUDA have no streams here: a copy is made at
    once, and every moment is None.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def record_compute(self) -> Any:
        """The moment when all that was launched so far is computed."""
        return None if self.stream is None else torch.cuda.current_stream(self.device).record_event()

    @contextmanager
    def copy_after(self, after: Any) -> Iterator[None]:
        """What is copied inside is so once the moment `after` has come, while the device computes."""
        if self.stream is None:
            yield
            return
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(after)
            yield

    def record_copy(self) -> Any:
        """The moment when all copies that were started beside are done."""
        return None if self.stream is None else self.stream.record_event()

    def copy(self, source: Tensor, target: Tensor, after: Any) -> Any:
        """Copy beside; returns the moment when that is done."""
        with self.copy_after(after):
            target.copy_(source, non_blocking=True)
        return self.record_copy()

    def wait(self, moment: Any) -> None:
        """Have all that is launched from here on wait for the moment."""
        if moment is not None:
            torch.cuda.current_stream(self.device).wait_event(moment)


HOST = torch.device("cpu")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(name: str, progress: Progress) -> torch.device:
    """`auto` is CUDA where there is one; says what was chosen. Raises `UsageError` for a device that is not there."""
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
    """`auto` is bfloat16 on CUDA and float32 on the CPU; says what was chosen."""
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
        progress.note(f"dtype={name} (auto)")
    return DTYPES[name]
