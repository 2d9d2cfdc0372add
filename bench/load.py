"""Measures the speed of weight loading and of `cat` of the same files: GB/s, alternately, from the file cache.

    python bench/load.py                                     # 2.7 GB of random weights in a temporary folder
    python bench/load.py FOLDER --model wan22_t2v_a14b       # the folder of a checkpoint's transformer
    python bench/load.py --dtype float32 --device cuda       # converted; to another device

A warm-up round fills the file cache. `cat` only copies into one small buffer. Loading also allocates the memory of the
weights, which the system first fills with zeros.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from hydrarun.config.compose import compose_unchecked
from hydrarun.config.targets import load_class
from hydrarun.core.device import DTYPES
from hydrarun.core.progress import Progress
from hydrarun.core.tables import Table, format_plain
from hydrarun.core.threads import ThreadPool
from hydrarun.models.weights.loader import find_placement, load_transformer
from hydrarun.models.weights.safetensors import Checkpoint


def save_random(cls: Any, folder: Path, blocks: int) -> None:
    """Save a bfloat16 checkpoint of `cls` at its published width with `blocks` blocks, one file per block."""
    settings = {"num_layers": blocks}
    with torch.device("meta"):
        transformer = cls(**settings)
    files: dict[str, str] = {}
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in transformer.named_parameters():
        shard = "".join(part for part in name.split(".") if part.isdecimal()) or "around"
        for piece in find_placement(transformer, name, tuple(value.shape)).pieces:
            files[piece.source] = f"{shard}.safetensors"
            shards.setdefault(files[piece.source], {})[piece.source] = torch.randn(piece.shape, dtype=torch.bfloat16)
    for file, tensors in shards.items():
        save_file(tensors, folder / file)
    index = {"weight_map": files}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(settings))


def cat(files: Sequence[Path]) -> float:
    """Return the seconds of `cat FILES > /dev/null`."""
    start = time.perf_counter()
    subprocess.run(["cat", *files], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def load(cls: Any, folder: Path, device: torch.device, dtype: torch.dtype) -> float:
    """Return the seconds of our loader."""
    options = {"device": device, "dtype": dtype, "note": print}
    start = time.perf_counter()
    with Progress(quiet=True).reading("loading") as tally, ThreadPool() as pool:
        load_transformer(cls, folder, pool=pool, tally=tally, **options)
    return time.perf_counter() - start


def measure(cls: Any, folder: Path, arguments: argparse.Namespace) -> Table:
    """Return a table with GB/s of both, and the median ratio."""
    headers = Checkpoint(folder).headers
    files = sorted({header.path for header in headers.values()})
    size = sum(file.stat().st_size for file in files) / 1e9
    device, dtype = torch.device(arguments.device), DTYPES[arguments.dtype]
    rounds = [(cat(files), load(cls, folder, device, dtype)) for _ in range(arguments.rounds + 1)][1:]
    rows = []
    for name, seconds in zip((f"cat {len(files)} files", "hydrarun"), zip(*rounds, strict=True), strict=True):
        low, high = size / max(seconds), size / min(seconds)
        rows.append((name, f"{size / statistics.median(seconds):.2f}", f"{low:.2f} - {high:.2f}"))
    ratio = statistics.median(theirs / ours for theirs, ours in rounds)
    title = f"{size:.2f} GB to {arguments.dtype} on {device}, {arguments.rounds} rounds; hydrarun / cat: {ratio:.2f}"
    return Table(title, ("", "GB/s", "min - max"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="folder of a transformer (default: a random one)")
    parser.add_argument("--model", default="qwen_image", help="model option of the transformer")
    parser.add_argument("--blocks", type=int, default=4, help="blocks of the random transformer")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    config, _ = compose_unchecked([f"model={arguments.model}"])
    cls = load_class(config["model"]["transformer"], "model.transformer")
    with tempfile.TemporaryDirectory() as temporary:
        if arguments.folder is None:
            save_random(cls, Path(temporary), arguments.blocks)
        table = measure(cls, arguments.folder or Path(temporary), arguments)
    print(format_plain(table))
    print(f"Measured on {platform.machine()}, {ThreadPool().threads} threads, torch {torch.__version__}.")


if __name__ == "__main__":
    main()
