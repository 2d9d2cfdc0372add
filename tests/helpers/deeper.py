"""Tiny checkpoints with twice the blocks, since two blocks are too few to be prefetched in a ring."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

from safetensors.torch import load_file, save_file

from hydrarun.config.checks.checkpoint import DEPTHS
from tests.helpers import subjects

#: config keys with the lengths of block lists, by a part of the list names
LENGTHS = {
    "single": "num_single_layers",
    "blocks": "num_layers",
    "refiner": "n_refiner_layers",
    "layers": "n_layers",
}
STEM = "diffusion_pytorch_model.safetensors"


def deeper_subject(subject: subjects.Subject, into: Path) -> subjects.Subject:
    """Return the subject with twice the blocks, without a runner."""
    folder = deeper(subject.folder, into / subject.name)
    (into / subjects.IMAGE).symlink_to(subject.folder.parent / subjects.IMAGE)
    return replace(subject, folder=folder, runner=None)


def deeper(folder: Path, into: Path) -> Path:
    """Write the checkpoint of `folder` with twice the blocks: scaled copies of block 0 precede the old ones."""
    into.mkdir()
    for part in folder.iterdir():
        if part.name.startswith("transformer"):
            (into / part.name).mkdir()
            depths = double_config(part / "config.json", into / part.name / "config.json")
            save_file(dict(doubled(load_file(part / STEM), depths)), into / part.name / STEM)
        else:
            (into / part.name).symlink_to(part)
    return into


def double_config(old: Path, new: Path) -> dict[str, int]:
    """Write the config with doubled depths; return the old depths. Copies of block 0 have dual attention like it."""
    config = json.loads(old.read_text())
    depths = {key: config[key] for key in DEPTHS if key in config}
    doubled = {key: 2 * depth for key, depth in depths.items()}
    if kind := config.get("dual_attention_layers"):
        depth = depths["num_layers"]
        doubled["dual_attention_layers"] = [*range(depth), *(index + depth for index in kind)]
    new.write_text(json.dumps(config | doubled))
    return depths


def doubled(weights, depths):
    """Yield all tensors: blocks at later indices, preceded by copies of the first block with decreasing weights."""
    for name, weight in weights.items():
        found = re.match(r"(\w*blocks|layers|\w*refiner)\.(\d+)\.(.*)", name)
        if not found:
            yield name, weight
            continue
        depth = depths[next(key for word, key in LENGTHS.items() if word in found[1])]
        yield f"{found[1]}.{int(found[2]) + depth}.{found[3]}", weight
        if found[2] == "0":
            for index in range(depth):
                yield f"{found[1]}.{index}.{found[3]}", weight * 0.75 ** (index + 1)
