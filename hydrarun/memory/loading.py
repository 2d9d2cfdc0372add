"""Weights into a transformer: built on the meta device, then every tensor read straight into its place."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from hydrarun.errors import RunError, nearest
from hydrarun.memory.safetensors_files import Checkpoint
from hydrarun.transformer import Transformer


@dataclass(frozen=True)
class Placement:
    """One of our parameters, and the checkpoint's tensors that make it, fused along dimension 0."""

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    #: rows that each source fills
    rows: tuple[int, ...]


def load_transformer(
    cls: type[Transformer],
    folder: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    note: Callable[[str], None],
) -> Transformer:
    """Build `cls` from `folder`'s config.json and fill it from its safetensors files.

    Raises `RunError` naming file and tensor for whatever is missing, not used, wrongly shaped or unreadable.
    """
    arguments = read_config(cls, folder / "config.json", note)
    with torch.device("meta"):
        transformer = cls(**arguments).eval().requires_grad_(False)
    transformer.config = arguments
    checkpoint = Checkpoint(folder)
    placements = plan(transformer, checkpoint)
    with ExitStack() as files:
        read = Reader(checkpoint, files)
        for placement in placements:
            kept = set(placement.name.split(".")) & set(cls.keep_in_float32)
            tensor = torch.empty(placement.shape, dtype=torch.float32 if kept else dtype, device=device)
            parts = tensor.split(placement.rows) if len(placement.rows) > 1 else (tensor,)
            for part, source in zip(parts, placement.sources, strict=True):
                part.copy_(read(source))
            put(transformer, placement.name, tensor)
    return transformer


def read_config(cls: type, path: Path, note: Callable[[str], None]) -> dict[str, Any]:
    """The constructor's arguments from a config.json; keys that it does not take are named in a note."""
    try:
        config = json.loads(path.read_text())
        given = {key: value for key, value in config.items() if not key.startswith("_")}
    except FileNotFoundError:
        raise RunError(f"{path}: no such file") from None
    except (ValueError, AttributeError):
        raise RunError(f"{path}: not a JSON object") from None
    accepted = inspect.signature(cls).parameters
    unused = sorted(set(given) - set(accepted))
    if unused:
        note(f"{path.parent.name}/{path.name}: {', '.join(unused)} not used by {cls.__name__}")
    return {key: value for key, value in given.items() if key in accepted}


def plan(transformer: Transformer, checkpoint: Checkpoint) -> list[Placement]:
    """Which of the checkpoint's tensors go where; every one must be used, and every place filled."""
    placements = [place(transformer, name, tuple(value.shape)) for name, value in transformer.named_parameters()]
    shapes = checkpoint.shapes
    used = {source for placement in placements for source in placement.sources}
    check_names(checkpoint, missing=used - set(shapes), unexpected=set(shapes) - used)
    for placement in placements:
        wanted = [placement.shape if len(placement.rows) < 2 else (n, *placement.shape[1:]) for n in placement.rows]
        for source, shape in zip(placement.sources, wanted, strict=True):
            if shapes[source] != shape:
                raise RunError(
                    f"{checkpoint.files[source]}: {source!r} has shape {list(shapes[source])}, config.json asks for"
                    f" {list(shape)}"
                )
    return placements


def place(transformer: Transformer, name: str, shape: tuple[int, ...]) -> Placement:
    """Where our parameter `name` comes from. A layer that fuses several tells their rows by `fused_rows`."""
    sources = source_names(name, transformer.weight_map)
    owner = transformer.get_submodule(name.rpartition(".")[0])
    return Placement(name, shape, sources, owner.fused_rows if len(sources) > 1 else shape[:1])


def check_names(checkpoint: Checkpoint, *, missing: set[str], unexpected: set[str]) -> None:
    """Raise for tensors that the checkpoint lacks, or has and the model does not use."""
    where = checkpoint.index_path if checkpoint.index_path.is_file() else checkpoint.single_path
    if missing:
        name = min(missing)
        raise RunError(
            f"{where}: {len(missing)} tensors are missing, the first is {name!r}.{nearest(name, unexpected)}"
            " Is this the checkpoint of another model, or an incomplete download?"
        )
    if unexpected:
        name = min(unexpected)
        raise RunError(
            f"{checkpoint.files[name]}: {len(unexpected)} tensors have no place in this model, the first is {name!r}."
            " Does config.json belong to these weights?"
        )


def source_names(name: str, weight_map: Mapping[str, str | tuple[str, ...]]) -> tuple[str, ...]:
    """The checkpoint's names of our parameter `name`, by the transformer's weight map."""
    module, _, leaf = name.rpartition(".")
    parts = module.split(".")
    index = next((part for part in parts if part.isdecimal()), "")
    pattern = ".".join("*" if part.isdecimal() else part for part in parts)
    # the longest prefix that the map knows; what follows it keeps its name
    for end in range(len(parts), 0, -1):
        prefix = ".".join(pattern.split(".")[:end])
        if prefix in weight_map:
            theirs = weight_map[prefix]
            rest = "".join(f".{part}" for part in (*parts[end:], leaf))
            return tuple(
                # an empty name is the checkpoint's root
                (source.replace("*", index) + rest).lstrip(".")
                for source in (theirs if isinstance(theirs, tuple) else (theirs,))
            )
    return (name,)


class Reader:
    """Reads tensors by name; each file is opened (memory-mapped) once."""

    def __init__(self, checkpoint: Checkpoint, files: ExitStack) -> None:
        self.checkpoint = checkpoint
        self.files = files
        self.open: dict[Path, Any] = {}

    def __call__(self, name: str) -> Tensor:
        path = self.checkpoint.files[name]
        try:
            if path not in self.open:
                self.open[path] = self.files.enter_context(safe_open(path, framework="pt"))
            return self.open[path].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise RunError(f"{path}: {name!r} cannot be read: {error}") from None


def put(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Replace the parameter `name`, which is on the meta device, by `tensor`."""
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))
