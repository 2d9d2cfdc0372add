"""Loads transformers and prints the peak host memory: `python -m tests.helpers.peak FOLDER`.

The checkpoints are sparse files, which have full size for readers and take no time to write.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import T5Config, T5EncoderModel

from hydrarun.core.progress import Progress
from hydrarun.core.threads import ThreadPool
from hydrarun.models.qwen_image import QwenImageTransformer
from hydrarun.models.weights.loader import find_placement, load_transformer
from hydrarun.pipeline.components import load_component

SMALL = {"num_layers": 1, "attention_head_dim": 16, "num_attention_heads": 3, "axes_dims_rope": (8, 4, 4)}
LARGE = {"num_layers": 2, "attention_head_dim": 128, "num_attention_heads": 12}
BYTES = {"BF16": 2, "F32": 4}


def save(folder: Path, settings: dict, kind: str) -> Path:
    """Write a checkpoint of zeros for a transformer with these settings."""
    with torch.device("meta"):
        transformer = QwenImageTransformer(**settings)
    names = ((name, tuple(value.shape)) for name, value in transformer.named_parameters())
    pieces = [piece for name, shape in names for piece in find_placement(transformer, name, shape).pieces]
    folder.mkdir()
    write(folder / "diffusion_pytorch_model.safetensors", {piece.source: piece.shape for piece in pieces}, kind)
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def save_encoder(folder: Path, width: int, kind: str) -> Path:
    """Write a checkpoint of zeros for a text encoder."""
    config = T5Config(d_model=width, d_ff=4 * width, num_layers=6, vocab_size=32 * width)
    with torch.device("meta"):
        encoder = T5EncoderModel(config)
    config.save_pretrained(folder / "text_encoder")
    shapes = {name: tuple(value.shape) for name, value in encoder.named_parameters()}
    write(folder / "text_encoder" / "model.safetensors", shapes, kind)
    return folder


def write(file: Path, shapes: dict, kind: str) -> None:
    """Write a safetensors file of zeros."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * BYTES[kind]
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(file, 8 + len(text) + end)


def load(folder: Path) -> torch.nn.Module:
    with Progress(quiet=True).reading("loading") as tally, ThreadPool() as pool:
        options = {"device": torch.device("cpu"), "dtype": torch.bfloat16, "note": print}
        return load_transformer(QwenImageTransformer, folder, pool=pool, tally=tally, **options)


def load_encoder(folder: Path) -> torch.nn.Module:
    entry = ("transformers", "T5EncoderModel")
    return load_component(folder, "text_encoder", entry, device=torch.device("cpu"), dtype=torch.bfloat16)


def held(key: str) -> int:
    """Return a value of /proc/self/status in bytes. (`ru_maxrss` would start at the value of the parent.)"""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:")]
    return int(line.split()[1]) * 1024


def measure(load: Callable[[Path], torch.nn.Module], folder: Path) -> dict[str, int]:
    """Return the bytes of the parameters, and the peak growth of the process while they are loaded."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = held("VmRSS")
    module = load(folder)
    return {"stays": sum(parameter.nbytes for parameter in module.parameters()), "peak": held("VmHWM") - before}


if __name__ == "__main__":
    root = Path(sys.argv[1])
    load(save(root / "small", SMALL, "F32"))  # warm-up: one-time imports and threads
    load_encoder(save_encoder(root / "small encoder", 16, "F32"))
    found = {kind: measure(load, save(root / kind, LARGE, kind)) for kind in BYTES}
    found |= {f"encoder {kind}": measure(load_encoder, save_encoder(root / f"e{kind}", 1024, kind)) for kind in BYTES}
    print(json.dumps(found))
