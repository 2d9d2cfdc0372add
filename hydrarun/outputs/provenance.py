"""Provenance of an output: configuration hash, versions and hardware; and redaction of what gets published."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import resource
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from hydrarun.core.moved_names import use_original_names
from hydrarun.core.version import __version__

PACKAGES = ("torch", "diffusers", "transformers", "safetensors", "numpy", "pillow", "cache-dit", "torchao", "torchsde")

SECRET_KEY = re.compile(r"(^|_)(token|password|secret|api_?key)$", re.IGNORECASE)
SECRET_TEXT = re.compile(r"\bhf_[A-Za-z0-9]{8,}")
REMOVED = "[removed]"

#: sections that version 0.1.0 did not have
LATER = ("scheduler",)


def hash_config(config: dict[str, Any]) -> str:
    """Return 8 hex digits that identify the requested configuration, equal in all versions that support it.

    Class names are mapped to their original names, and empty sections that later versions added are ignored. So a batch
    begun by an older version can be resumed, and its files keep their names.
    """
    wanted = {
        key: value
        for key, value in use_original_names(keep_pixel_settings(config)).items()
        if key not in LATER or value
    }
    canonical = json.dumps(wanted, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode(errors="surrogatepass")).hexdigest()[:8]


def keep_pixel_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a configuration that affects the pixels.

    Leaves out `output`, `report`, `verify`, `plan`, `warmup` and `strict_prompt`, the settings of a batch
    (`batch_size`, `retry`, `fail_fast`), the model's `facts` (published figures) and `judge`, the folder of compiled
    graphs, and the limit on the number of ranks. Paths in the home folder start with `~`, so that a redacted
    configuration gives the same result as its original.
    """
    unseen = ("output", "report", "verify", "plan", "warmup", "batch_size", "retry", "fail_fast", "strict_prompt")
    kept = {key: value for key, value in redact_config(config).items() if key not in unseen}
    for section, beside in (("model", ("facts", "judge")), ("compile", ("cache_dir",)), ("parallel", ("max_ranks",))):
        kept[section] = {key: value for key, value in kept.get(section, {}).items() if key not in beside}
    return kept


def collect_versions() -> dict[str, str | None]:
    """Return the versions of hydrarun, Python and the packages that compute the pixels; None if not installed."""
    return {"hydrarun": __version__, "python": platform.python_version()} | {
        package: _find_version(package) for package in PACKAGES
    }


def _find_version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def describe_hardware(device: str) -> dict[str, Any]:
    """Describe the hardware that can change the last bits of a picture. `device`: cpu, cuda or cuda:N."""
    import torch

    facts: dict[str, Any] = {
        "cpu": _read_cpu_name(),
        "cpu_cores": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch_threads": torch.get_num_threads(),
    }
    if device.startswith("cuda"):
        major, minor = torch.cuda.get_device_capability(device)
        facts |= {
            "gpu": torch.cuda.get_device_name(device),
            "gpu_capability": f"{major}.{minor}",
            "gpu_bytes": torch.cuda.get_device_properties(device).total_memory,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return facts


def _read_cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def measure_peak_host_bytes() -> int:
    """Return the peak resident memory of this process in bytes; on Linux since `reset_peak_host_bytes`."""
    with suppress(OSError):
        if match := re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text()):
            return int(match[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, others KiB


def reset_peak_host_bytes() -> None:
    """Restart the measurement of the peak, if the system supports it (Linux)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def redact_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return a copy that is safe to publish: the home folder becomes `~`, secrets are removed. Idempotent.

    Keys named like a secret (`token`, `password`, `api_key`, ...) are dropped with their values, and Hugging Face
    tokens inside any text are replaced. `sampling` is kept verbatim: a changed prompt would be another picture.
    """
    home = str(Path.home())
    return _map_texts(config, lambda text: _shorten_home_text(SECRET_TEXT.sub(REMOVED, text), home))


def expand_home(config: dict[str, Any]) -> dict[str, Any]:
    """Undo the path shortening of `redact_config`: `~` at the start of a path becomes the home folder."""
    return _map_texts(config, _expand_home_text)


def redact_text(text: str) -> str:
    """Redact free text, such as an error message: the home folder becomes `~`, tokens are replaced."""
    return SECRET_TEXT.sub(REMOVED, text).replace(str(Path.home()), "~")


def _shorten_home_text(text: str, home: str) -> str:
    return "~" + text[len(home) :] if text == home or text.startswith(home + os.sep) else text


def _expand_home_text(text: str) -> str:
    return str(Path.home()) + text[1:] if text == "~" or text.startswith("~" + os.sep) else text


def _map_texts(config: dict[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    def walk(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: walk(child) for key, child in value.items() if not SECRET_KEY.search(str(key))}
        if isinstance(value, list | tuple):
            return [walk(child) for child in value]
        return change(value) if isinstance(value, str) else value

    kept = {"sampling": config["sampling"]} if "sampling" in config else {}
    return walk(config) | kept
