"""Loads a checkpoint in a process of its own and prints what the host's memory held: `python peak.py FOLDER`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import tiny
import torch

from hydrarun.components import load_component
from hydrarun.models.qwen_image import QwenImageTransformer


def kib(key: str) -> int:
    """A number of bytes from Linux' record of this process. ru_maxrss would begin with the parent's."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:")]
    return int(line.split()[1]) * 1024


def held(load) -> dict[str, int]:
    """The bytes of what `load` returns, and the most that the process grew by meanwhile."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins again
    before = kib("VmRSS")
    module = load()
    return {"stays": sum(p.nbytes for p in module.parameters()), "peak": kib("VmHWM") - before}


if __name__ == "__main__":
    small, *folders = map(Path, sys.argv[1:])
    tiny.load_transformer(QwenImageTransformer, small)  # imports, threads
    for folder in folders:
        if folder.name == "text_encoder":
            entry = ("transformers", "T5EncoderModel")
            one = lambda: load_component(folder.parent, folder.name, entry, device=torch.device("cpu"), dtype=torch.bfloat16)
        else:
            one = lambda: tiny.load_transformer(QwenImageTransformer, folder, torch.bfloat16)
        print(json.dumps(held(one)), flush=True)
