"""Memory and rates of devices: published figures, and this machine's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from hydrarun.core.errors import UsageError, suggest_name

if TYPE_CHECKING:
    import torch

GIB = 2**30
#: bytes reserved for CUDA and its libraries
RESERVED = GIB


@dataclass(frozen=True)
class DeviceSpec:
    """A device. Rates are in units per second, or None if unknown."""

    name: str
    memory: int  # bytes available to a run
    kind: str  # torch device type: cuda or cpu
    float16: float | None = None  # floating-point operations of matrix products
    float8: float | None = None
    link: float | None = None  # bytes to another device
    host: float | None = None  # bytes from the host


def read_devices() -> dict[str, DeviceSpec]:
    """Read the devices of devices.yaml."""
    content = yaml.safe_load(Path(__file__).with_name("devices.yaml").read_text())
    return {name: parse_device(name, values) for name, values in content.items()}


def parse_device(name: str, values: dict[str, float]) -> DeviceSpec:
    """Convert one entry of devices.yaml to bytes and units per second."""
    return DeviceSpec(
        name,
        round(values["memory"] * GIB) - RESERVED,
        "cuda",
        values["float16"] * 1e12,
        values["float8"] * 1e12 if "float8" in values else None,
        values["link"] * 1e9,
        values["host"] * 1e9,
    )


def find_device(name: str) -> DeviceSpec:
    """Return the published device `name`. Raises `UsageError` if it is unknown."""
    known = read_devices()
    if name not in known:
        raise UsageError(f"plan.device={name}: not known here.{suggest_name(name, known)} Known: {', '.join(known)}")
    return known[name]


def read_local_device(device: torch.device) -> DeviceSpec:
    """Describe a device of this machine, with published rates if its model is known."""
    import torch

    from hydrarun.core.device import read_total_bytes

    memory = read_total_bytes(device)
    if device.type == "cpu":
        return DeviceSpec("this machine's memory", memory, "cpu")
    if device.type != "cuda":
        return DeviceSpec(device.type, memory, "cuda")
    called = torch.cuda.get_device_name(device)
    like = [known for key, known in read_devices().items() if key in called.lower().replace(" ", "")]
    rates = vars(like[0]) if like else {}
    return DeviceSpec(**{**rates, "name": called, "memory": memory - RESERVED, "kind": "cuda"})


def format_gib(size: float) -> str:
    """Format bytes as GiB, or as MiB below 0.01 GiB."""
    return f"{size / GIB:,.2f} GiB" if size >= GIB / 100 else f"{size / 2**20:,.1f} MiB"
