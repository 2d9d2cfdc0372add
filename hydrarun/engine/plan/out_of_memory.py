"""The message when memory runs out: where, what the plan expects beside what was there, and what would fit."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from hydrarun.config import targets
from hydrarun.core.device import peak_bytes, total_bytes
from hydrarun.core.distributed.degrees import world_size
from hydrarun.core.errors import OutOfMemoryError
from hydrarun.engine.plan.devices import Device, gib

#: seconds that a plan may take, on a machine that may be short of host memory too
PATIENCE = 120


def out_of_memory(config: Mapping[str, Any], phase: str, device: torch.device) -> OutOfMemoryError:
    """What to raise when `device` had no memory left in a phase of this run."""
    total, peak = total_bytes(device), peak_bytes(device)
    first = f"out of memory in {phase}: {device} has {gib(total)}, and at most {gib(peak)} were in use"
    try:
        made = ask(config, Device(str(device), total, "cpu" if device.type == "cpu" else "cuda"))
    except (OSError, ValueError, subprocess.SubprocessError):
        return OutOfMemoryError(f"{first}; no plan could be made of it. Try offload=model, or a smaller size")
    return OutOfMemoryError("\n".join([first, *expected(made, phase), *fixes(made)]))


def ask(config: Mapping[str, Any], device: Device) -> dict[str, Any]:
    """The plan of `config` by another process. Raises `SubprocessError` or `ValueError` if there is none."""
    plain = {**config, "device": device.kind, "plan": {"auto": False, "device": None}}
    ranks = world_size(config["parallel"])
    asked = {"config": plain, "device": asdict(device), "ranks": ranks, "targets": targets.allowed_by_user()}
    command = [sys.executable, "-m", "hydrarun.engine.plan"]
    done = subprocess.run(
        command, input=json.dumps(asked), capture_output=True, text=True, timeout=PATIENCE, check=True
    )
    return json.loads(done.stdout)


def expected(made: Mapping[str, Any], phase: str) -> list[str]:
    """The plan's numbers of that phase, or of all where it is none of them."""
    phases = [one for one in made["phases"] if one["phase"] == phase] or made["phases"]
    return [
        f"the plan expects in {one['phase']}: weights {gib(one['weights_bytes'])}, activations"
        f" {gib(one['activations_bytes'])}, together {gib(one['peak_bytes'])}"
        for one in phases
    ]


def fixes(made: Mapping[str, Any]) -> list[str]:
    """What would fit."""
    found = [" ".join(one["overrides"]) for one in made["suggestions"] if one["overrides"]]
    if not found:
        return ["nothing else of offload, quantization and vae.tiling fits: a smaller size, or more ranks"]
    return [f"it fits with {' | '.join(found)}"]
