"""A component's weights for transformers' loader, each read from its file when the loader asks for it.

The library by itself maps the files: pages of a mapped file count as this process's memory beside what is made of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor

from hydrarun.core.device import HOST
from hydrarun.models.weights.safetensors import Checkpoint, Header
from hydrarun.models.weights.tensor_reader import (
    DTYPES,
    TensorPiece,
    allocate_tensor,
    check_piece,
    count_piece_bytes,
    read_piece,
)


@dataclass(frozen=True)
class LazyTensor:
    """A tensor in a file, as the loader takes one of a safetensors file that it opened itself: `unread[...]`."""

    header: Header
    piece: TensorPiece
    dtype: torch.dtype
    add: Callable[[int], None]

    def __getitem__(self, everything: EllipsisType) -> Tensor:
        tensor = allocate_tensor(self.piece.shape, self.dtype, HOST)
        read_piece(self.header, self.piece, tensor)
        self.add(count_piece_bytes(self.header, self.piece))
        return tensor

    def get_shape(self) -> list[int]:
        return list(self.piece.shape)


def make_lazy_state_dict(checkpoint: Checkpoint, dtype: torch.dtype, add: Callable[[int], None]) -> dict[str, Any]:
    """All of them, by name; `add` is told of the bytes that were read.

    They are read as `dtype` where that is wide enough for all that a library may keep in float32 (which transformers
    does with some weights beside float16); then the loader narrows the others.
    """
    found = {}
    for name, header in checkpoint.headers.items():
        piece = TensorPiece(name, tuple(header.tensors[name]["shape"]))
        check_piece(header, piece)
        own = DTYPES[header.tensors[name]["dtype"]]
        found[name] = LazyTensor(header, piece, dtype if own.is_floating_point and dtype != torch.float16 else own, add)
    return found
