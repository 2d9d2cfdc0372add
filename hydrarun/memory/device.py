"""The device that a run computes on, whatever its kind: torch has the same functions in a module of each."""

from __future__ import annotations

import os

import torch


def count(device: torch.device) -> int:
    """How many devices of this kind torch sees."""
    return torch.get_device_module(device).device_count()


def synchronize(device: torch.device) -> None:
    """Wait until all that was launched is done."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


def peak_bytes(device: torch.device) -> int:
    """The most that this process held on the device so far; 0 for the CPU, which is the host."""
    return 0 if device.type == "cpu" else torch.get_device_module(device).max_memory_allocated(device)


def total_bytes(device: torch.device) -> int:
    """The memory of the device; of the CPU the host's."""
    if device.type == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return torch.get_device_module(device).mem_get_info(device)[1]


def empty_cache(device: torch.device) -> None:
    """Give back what torch holds and nothing uses, so that large weights find room in one piece."""
    if device.type != "cpu":
        torch.get_device_module(device).empty_cache()
