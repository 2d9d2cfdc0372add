"""Loads a transformer: builds it on the meta device, then reads every tensor directly into place, in threads.

Libraries that build other components meanwhile change torch's default dtype and patch how modules set parameters. So
the threads pass every dtype explicitly, and write only to the transformer's own parameter dictionaries.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hydrarun.core.distributed.mesh import Axis
from hydrarun.core.errors import RunError, suggest_name
from hydrarun.core.progress import ByteCounter
from hydrarun.core.threads import ThreadPool
from hydrarun.models.layers.tensor_parallel import ShardedModule, shard_layers
from hydrarun.models.transformer import Transformer
from hydrarun.models.weights.config_size import build_on_meta, check_counts, limit_parameter_count
from hydrarun.models.weights.safetensors import Checkpoint, read_checkpoint_json
from hydrarun.models.weights.tensor_reader import (
    Index,
    Shape,
    TensorPiece,
    allocate_tensor,
    count_piece_bytes,
    read_piece,
)


@dataclass(frozen=True)
class Placement:
    """One of our parameters and the checkpoint pieces that fill it."""

    name: str
    #: shape on this rank
    shape: Shape
    pieces: tuple[TensorPiece, ...]


def load_transformer(
    cls: type[Transformer],
    folder: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    note: Callable[[str], None],
    pool: ThreadPool,
    tally: ByteCounter,
    axis: Axis | None = None,
    left: Callable[[Transformer], Iterable[str]] = lambda _: (),
    loaded: Callable[[Transformer, str], None] | None = None,
) -> Transformer:
    """Build `cls` from `folder`'s config.json and start jobs in `pool` that fill it from the safetensors files.

    It is complete when the pool is done. With `axis`, only this rank's shard of the weights is held
    (`layers.tensor_parallel`). The weights of modules that `left` names are checked but not read: they stay on the meta
    device. `loaded` is called in a thread with the name of each parameter once it is in place, and may replace it.
    `tally` counts bytes. Raises `RunError` naming file and tensor if a tensor is missing, not used or wrongly shaped
    (read errors are raised on leaving the pool), and `UsageError` for more ranks than can share the weights.
    """
    device = torch.empty(0, device=device).device  # add the index: "cuda" may be another device in another thread
    arguments = read_config(cls, folder / "config.json", note)
    checkpoint, where = Checkpoint(folder), str(folder / "config.json")
    check_counts(where, arguments, len(checkpoint.headers))
    transformer = build_on_meta(where, lambda: cls(**arguments), limit_parameter_count(checkpoint))
    transformer.eval().requires_grad_(False)
    transformer.config = arguments
    if axis is not None:
        shard_layers(transformer, axis)
    placements = plan_placements(transformer, checkpoint)
    skipped = tuple(f"{name}." for name in left(transformer))

    def place_one(placement: Placement) -> None:
        kind = find_parameter_dtype(transformer, placement.name, dtype)
        set_parameter(transformer, placement.name, read_parameter(placement, checkpoint, device, kind))
        tally.add(count_read_bytes(placement, checkpoint))
        if loaded is not None:
            loaded(transformer, placement.name)

    wanted = [placement for placement in placements if not placement.name.startswith(skipped)]
    tally.expect(sum(count_read_bytes(placement, checkpoint) for placement in wanted))
    for placement in wanted:
        pool.start(place_one, placement)
    return transformer


def find_parameter_dtype(transformer: Transformer, name: str, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the parameter `name`, by default `dtype`."""
    return torch.float32 if set(name.split(".")) & set(transformer.keep_in_float32) else dtype


def read_parameter(placement: Placement, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Read a parameter from its files."""
    tensor = allocate_tensor(placement.shape, dtype, device)
    for piece in placement.pieces:
        read_piece(checkpoint.headers[piece.source], piece, tensor[piece.put])
    return tensor


def count_read_bytes(placement: Placement, checkpoint: Checkpoint) -> int:
    """Count the bytes that are read for a parameter."""
    return sum(count_piece_bytes(checkpoint.headers[piece.source], piece) for piece in placement.pieces)


def read_config(cls: type, path: Path, note: Callable[[str], None]) -> dict[str, Any]:
    """Read the constructor's arguments from a config.json. A note names the keys that it does not accept.

    Raises `RunError` for a switch that is neither true nor false: others would be taken for one of both.
    """
    given = {key: value for key, value in read_checkpoint_json(path).items() if not key.startswith("_")}
    accepted = inspect.signature(cls).parameters
    unused = sorted(set(given) - set(accepted))
    if unused:
        note(f"{path.parent.name}/{path.name}: {', '.join(unused)} not used by {cls.__name__}")
    for key, value in given.items():
        if key in accepted and accepted[key].annotation == "bool" and not isinstance(value, bool):
            raise RunError(f"{path}: {key}: {json.dumps(value)[:100]} is not true or false")
    return {key: value for key, value in given.items() if key in accepted}


def plan_placements(transformer: Transformer, checkpoint: Checkpoint) -> list[Placement]:
    """Assign the checkpoint's tensors to parameters. Every tensor must be used and every parameter filled."""
    parameters = transformer.named_parameters()
    placements = [find_placement(transformer, name, tuple(value.shape)) for name, value in parameters]
    shapes = checkpoint.shapes
    pieces = [piece for placement in placements for piece in placement.pieces]
    used = {piece.source for piece in pieces}
    check_names(checkpoint, missing=used - set(shapes), unexpected=set(shapes) - used)
    for piece in pieces:
        source, shape = piece.source, shapes[piece.source]
        if shape != piece.shape:
            raise RunError(
                f"{checkpoint.headers[source].path}: {source!r} has shape {list(shape)}, config.json asks for"
                f" {list(piece.shape)}"
            )
        checkpoint.headers[source].require_float(source)
    return placements


def find_placement(transformer: Transformer, name: str, shape: Shape) -> Placement:
    """Find the checkpoint pieces of our parameter `name`, which has `shape` on this rank."""
    sources = find_source_names(name, transformer.weight_map)
    owner, _, leaf = name.rpartition(".")
    layer = transformer.get_submodule(owner)
    dim = layer.shared_dims.get(leaf) if isinstance(layer, ShardedModule) else None
    if dim is None or (layer.axis is None and len(sources) == 1):
        return Placement(name, shape, (TensorPiece(sources[0], shape),))
    return Placement(name, shape, tuple(find_shard_pieces(layer, dim, sources, shape)))


def find_shard_pieces(layer: ShardedModule, dim: int, sources: tuple[str, ...], shape: Shape) -> Iterator[TensorPiece]:
    """Yield this rank's shard of each of the layer's runs, along `dim`.

    In the checkpoint, each run is a separate tensor, or one tensor holds all runs, concatenated.
    """
    single = len(sources) == 1
    names = sources * len(layer.runs) if single else sources
    passed = filled = 0
    for source, run in zip(names, layer.runs, strict=True):
        length = sum(map(len, layer.runs)) if single else len(run)
        begin = passed if single else 0
        start, stop = run.share(layer.axis)
        yield TensorPiece(
            source,
            (*shape[:dim], length, *shape[dim + 1 :]),
            taken=slice_dim(dim, begin + start, begin + stop),
            put=slice_dim(dim, filled, filled + stop - start),
        )
        passed += len(run)
        filled += stop - start


def slice_dim(dim: int, start: int, stop: int) -> Index:
    """Return the index of `start` to `stop` along `dim`."""
    return (*[slice(None)] * dim, slice(start, stop))


def check_names(checkpoint: Checkpoint, *, missing: set[str], unexpected: set[str]) -> None:
    """Raise `RunError` for tensors that the checkpoint lacks or that the model does not use."""
    where = checkpoint.index_path if checkpoint.sharded else checkpoint.single_path
    if missing:
        name = min(missing)
        raise RunError(
            f"{where}: {len(missing)} tensors are missing, the first is {name!r}.{suggest_name(name, unexpected)}"
            " Is this the checkpoint of another model, or an incomplete download?"
        )
    if unexpected:
        name = min(unexpected)
        raise RunError(
            f"{checkpoint.headers[name].path}: {len(unexpected)} tensors have no place in this model, the first is"
            f" {name!r}. Does config.json belong to these weights?"
        )


def find_source_names(name: str, weight_map: Mapping[str, str | tuple[str, ...]]) -> tuple[str, ...]:
    """Return the checkpoint's names for our parameter `name`, by the transformer's weight map."""
    module, _, leaf = name.rpartition(".")
    parts = module.split(".")
    index = next((part for part in parts if part.isdecimal()), "")
    pattern = ".".join("*" if part.isdecimal() else part for part in parts)
    # the longest prefix in the map; the rest of the name is the same in the checkpoint
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


def set_parameter(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Replace the parameter `name`, which is on the meta device, with `tensor`."""
    owner, _, leaf = name.rpartition(".")
    module.get_submodule(owner)._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
