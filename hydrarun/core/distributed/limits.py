"""How many ranks this machine may start. Files from strangers set degrees, so there must be a limit. No torch here."""

from __future__ import annotations

import os
from pathlib import Path

from hydrarun.core.distributed.rank import count_cores

#: ranks that a machine with fewer cores may start too, to try out a layout
MIN_CPU_RANKS = 8

#: a folder for each device, made by NVIDIA's driver
NVIDIA_DEVICES = Path("/proc/driver/nvidia/gpus")


def count_nvidia_devices() -> int:
    """Return the number of NVIDIA devices that this process may use; 0 also if it cannot be found out this way."""
    count = len(list(NVIDIA_DEVICES.glob("*")))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return count
    names = [name.strip() for name in visible.split(",")]
    end = next((index for index, name in enumerate(names) if name in ("", "-1")), len(names))
    return min(count, end)


def max_ranks(device: str) -> int:
    """Return the most ranks for `device` (of the configuration): CUDA devices; on the CPU one per core, or 8."""
    devices = 0 if device == "cpu" else count_nvidia_devices()
    return devices or max(MIN_CPU_RANKS, count_cores())
