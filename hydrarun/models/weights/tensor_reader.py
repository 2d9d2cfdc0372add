"""Reads bytes from a file into a tensor, on any device and in any dtype, without a second copy in host memory.

Files are read, not mapped: mapped pages would count as memory of this process, in addition to the tensors.
"""

from __future__ import annotations

import math
import mmap
import os
from contextlib import suppress
from dataclasses import dataclass
from typing import BinaryIO

import torch
from torch import Tensor

from hydrarun.core.errors import RunError
from hydrarun.core.files import open_file
from hydrarun.models.weights.header import Header

Shape = tuple[int, ...]
Index = tuple[slice, ...]

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

#: bytes of the staging buffer in each thread, used if a tensor cannot be read directly into place
CHUNK = 2**20

#: minimum bytes of a tensor in huge pages; fills at least one of them
LARGE = 2**22


@dataclass(frozen=True)
class TensorPiece:
    """The part of a checkpoint tensor that goes into one of our parameters."""

    source: str
    #: shape of the whole tensor
    shape: Shape
    #: slices that are taken from the tensor, and their position in the parameter; (): all
    taken: Index = ()
    put: Index = ()

    @property
    def rows(self) -> tuple[int, int]:
        """First index along dimension 0 that is read, and the one after the last."""
        first, last, _ = (self.taken or (slice(None),))[0].indices(self.shape[0] if self.shape else 1)
        return first, last


def count_row_bytes(header: Header, piece: TensorPiece) -> int:
    """Count the bytes in the file of one index along dimension 0."""
    return math.prod(piece.shape[1:]) * DTYPES[header.tensors[piece.source]["dtype"]].itemsize


def count_piece_bytes(header: Header, piece: TensorPiece) -> int:
    """Count the bytes that are read for the piece: whole rows, even if only some columns are taken."""
    first, last = piece.rows
    return (last - first) * count_row_bytes(header, piece)


def find_dtype(header: Header, name: str) -> torch.dtype:
    """Return the dtype of a tensor in the file. Raises `RunError` for one that torch does not have."""
    dtype = header.tensors[name]["dtype"]
    if dtype not in DTYPES:
        raise RunError(f"{header.path}: {name!r} has the dtype {dtype}, which cannot be read")
    return DTYPES[dtype]


def read_piece(header: Header, piece: TensorPiece, target: Tensor) -> None:
    """Read the piece into `target`. Raises `RunError` naming file and tensor if it cannot be read."""
    first, last = piece.rows
    row = count_row_bytes(header, piece)
    entry = header.tensors[piece.source]
    offset = header.start + entry["data_offsets"][0] + first * row
    dtype, columns = DTYPES[entry["dtype"]], piece.taken[1:]
    taken = (slice(None), *columns)
    target = target if target.ndim else target.view(1)
    try:
        with open_file(header.path, buffering=0) as file:
            if target.device.type == "cpu" and target.dtype == dtype and target.is_contiguous() and not columns:
                read_into_tensor(file, offset, target)
                return
            step = max(1, CHUNK // max(1, row))
            shape = (min(step, last - first), *piece.shape[1:])
            chunk = torch.empty(shape, dtype=dtype, pin_memory=target.device.type == "cuda")
            for start in range(0, last - first, step):
                part = chunk[: last - first - start]
                read_into_tensor(file, offset + start * row, part)
                target[start : start + len(part)].copy_(part[taken])
    except (OSError, EOFError) as error:
        raise RunError(f"{header.path}: {piece.source!r} cannot be read: {error}") from None


def read_into_tensor(file: BinaryIO, offset: int, tensor: Tensor) -> None:
    """Fill a contiguous tensor on the host with the file's bytes from `offset` on. Other threads can run meanwhile."""
    memory = memoryview(tensor.view(-1).view(torch.uint8).numpy())
    while len(memory):
        count = os.preadv(file.fileno(), [memory], offset)
        if not count:
            raise EOFError("the file has become shorter")
        memory, offset = memory[count:], offset + count


def allocate_tensor(shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Allocate memory for a weight. On the host, large weights use huge pages if the system has them: 4 KiB pages take
    longer to allocate than to fill."""
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
