"""Out-of-memory messages. A device's: the phase, the memory in use, the plan's estimate, and settings that would fit.

The host's is one line: a plan needs a process of its own, for which memory may be short too.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch

from hydrarun.config import targets
from hydrarun.core.device import read_peak_bytes, read_total_bytes
from hydrarun.core.distributed.degrees import world_size
from hydrarun.core.errors import OutOfMemoryError, is_host_memory_error, make_host_memory_error
from hydrarun.engine.plan.devices import DeviceSpec, format_gib

#: timeout of the plan in seconds; host memory may be short too
PATIENCE = 120


@contextmanager
def name_memory_errors(
    config: Callable[[], Mapping[str, Any]], phase: Callable[[], str], device: Callable[[], torch.device]
) -> Iterator[None]:
    """Turn errors about memory into an OutOfMemoryError. The arguments give what it describes once it is raised."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise make_memory_error(config(), phase(), device()) from error
    except (MemoryError, RuntimeError) as error:
        if is_host_memory_error(error):
            raise make_host_memory_error(error, phase()) from error
        raise


def make_memory_error(config: Mapping[str, Any], phase: str, device: torch.device) -> OutOfMemoryError:
    """Return the error to raise when `device` runs out of memory in a phase of this run."""
    total, peak = read_total_bytes(device), read_peak_bytes(device)
    first = f"out of memory in {phase}: {device} has {format_gib(total)}, and at most {format_gib(peak)} were in use"
    try:
        made = run_plan_process(config, DeviceSpec(str(device), total, "cpu" if device.type == "cpu" else "cuda"))
    except (OSError, ValueError, subprocess.SubprocessError):
        return OutOfMemoryError(f"{first}; no plan could be made. Try offload=model, or a smaller size")
    return OutOfMemoryError(first, *format_expected(made, phase), *format_fixes(made))


def run_plan_process(config: Mapping[str, Any], device: DeviceSpec) -> dict[str, Any]:
    """Plan `config` in another process. Raises `SubprocessError` or `ValueError` if that fails."""
    plain = {**config, "device": device.kind, "plan": {"auto": False, "device": None}}
    ranks = world_size(config["parallel"])
    asked = {"config": plain, "device": asdict(device), "ranks": ranks, "targets": targets.list_user_allowed()}
    command = [sys.executable, "-m", "hydrarun.engine.plan"]
    done = subprocess.run(
        command, input=json.dumps(asked), capture_output=True, text=True, timeout=PATIENCE, check=True
    )
    return json.loads(done.stdout)


def format_expected(made: Mapping[str, Any], phase: str) -> list[str]:
    """Format the plan's numbers for `phase`, or for all phases if the plan does not have it."""
    phases = [one for one in made["phases"] if one["phase"] == phase] or made["phases"]
    return [
        f"the plan expects in {one['phase']}: weights {format_gib(one['weights_bytes'])}, activations"
        f" {format_gib(one['activations_bytes'])}, together {format_gib(one['peak_bytes'])}"
        for one in phases
    ]


def format_fixes(made: Mapping[str, Any]) -> list[str]:
    """Format the settings that would fit."""
    found = [" ".join(one["overrides"]) for one in made["suggestions"] if one["overrides"]]
    if not found:
        return ["no other setting of offload, quantization and vae.tiling fits: use a smaller size, or more ranks"]
    return [f"it fits with {' | '.join(found)}"]
