"""A fake accelerator: the device "fake" over host memory, for tests of device placement without an accelerator.

It counts every byte, and operations that mix its tensors with host tensors raise. The library is compiled once (half
a minute) and kept in the user's cache.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import types
from functools import cache
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("fake.cpp")
FLAGS = ["-O1", "-std=c++20", "-shared", "-fPIC", "-w"]
LIBRARIES = ["-lc10", "-ltorch_cpu", "-ltorch"]


def compiler() -> str | None:
    """Return the path of the C++ compiler, or None."""
    return shutil.which(os.environ.get("CXX", "c++"))


@cache
def load() -> types.ModuleType:
    """Register the device; return `torch.fake`."""
    torch.ops.load_library(library())
    torch.utils.rename_privateuse1_backend("fake")
    torch._register_device_module("fake", module())
    return torch.get_device_module("fake")


def library() -> Path:
    """Return the compiled library for this source and torch version; compile it if needed."""
    key = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "hydrarun"
    path = folder / f"fakeacc-{key}.so"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")  # another process may compile it too
        home = Path(torch.__file__).parent
        paths = [f"-I{home}/include", f"-L{home}/lib"]
        subprocess.run([compiler(), *FLAGS, *paths, str(SOURCE), *LIBRARIES, "-o", str(unfinished)], check=True)
        unfinished.replace(path)
    return path


def module() -> types.ModuleType:
    """Build the device module with the functions that torch and hydrarun call."""
    fake = types.ModuleType("torch.fake")
    fake.is_available = fake.is_initialized = lambda: True
    fake.device_count = lambda: 1
    fake.current_device = lambda: 0
    fake.synchronize = fake.empty_cache = fake.manual_seed_all = lambda *_: None
    fake._is_in_bad_fork = lambda: False
    fake.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    fake.memory_allocated = lambda *_: torch.ops.fakeacc.live_bytes()
    fake.max_memory_allocated = lambda *_: torch.ops.fakeacc.peak_bytes()
    fake.limit = torch.ops.fakeacc.limit
    fake.mem_get_info = lambda *_: (fake.limit() - fake.memory_allocated(), fake.limit())
    fake.set_limit = torch.ops.fakeacc.set_limit
    fake.reset_peak_memory_stats = lambda *_: torch.ops.fakeacc.reset_peak()
    return fake
