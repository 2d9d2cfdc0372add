"""A process of its own that loads transformers and prints what the host's memory held: `python peak.py FOLDER`.

The checkpoints are sparse files: as large as others to whoever reads them, and made in no time.
"""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path

import torch

from hydrarun.memory.loading import load_transformer, place
from hydrarun.memory.pool import Pool
from hydrarun.models.qwen_image import QwenImageTransformer
from hydrarun.progress import Progress

SMALL = {"num_layers": 1, "attention_head_dim": 16, "num_attention_heads": 3, "axes_dims_rope": (8, 4, 4)}
LARGE = {"num_layers": 2, "attention_head_dim": 128, "num_attention_heads": 12}
BYTES = {"BF16": 2, "F32": 4}


def save(folder: Path, settings: dict, kind: str) -> Path:
    """A checkpoint of zeros for a transformer of these settings."""
    with torch.device("meta"):
        transformer = QwenImageTransformer(**settings)
    names = ((name, tuple(value.shape)) for name, value in transformer.named_parameters())
    pieces = [piece for name, shape in names for piece in place(transformer, name, shape).pieces]
    header, end = {}, 0
    for piece in pieces:
        start, end = end, end + math.prod(piece.shape) * BYTES[kind]
        header[piece.source] = {"dtype": kind, "shape": piece.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    folder.mkdir()
    file = folder / "diffusion_pytorch_model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(file, 8 + len(text) + end)
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def load(folder: Path) -> torch.nn.Module:
    with Progress(quiet=True).reading("loading") as tally, Pool() as pool:
        options = {"device": torch.device("cpu"), "dtype": torch.bfloat16, "note": print}
        return load_transformer(QwenImageTransformer, folder, pool=pool, tally=tally, **options)


def held(key: str) -> int:
    """Bytes, of Linux' record of this process. (`ru_maxrss` would begin with what the parent has.)"""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:")]
    return int(line.split()[1]) * 1024


def measure(folder: Path) -> dict[str, int]:
    """Bytes of the parameters, and the most that the process grew by while they were loaded."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = held("VmRSS")
    transformer = load(folder)
    return {"stays": sum(parameter.nbytes for parameter in transformer.parameters()), "peak": held("VmHWM") - before}


if __name__ == "__main__":
    root = Path(sys.argv[1])
    load(save(root / "small", SMALL, "F32"))  # what is imported and started only once
    print(json.dumps({kind: measure(save(root / kind, LARGE, kind)) for kind in BYTES}))
