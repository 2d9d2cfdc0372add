"""A component's weights for transformers' loader, each read from its file when the loader asks for it.

By default, the library maps the files. Mapped pages count as memory of this process, in addition to the tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor

from hydrarun.core.device import HOST
from hydrarun.models.weights.header import Header
from hydrarun.models.weights.safetensors import Checkpoint
from hydrarun.models.weights.tensor_reader import (
    TensorPiece,
    allocate_tensor,
    count_piece_bytes,
    find_dtype,
    read_piece,
)


@dataclass(frozen=True)
class LazyTensor:
    """A tensor in a file, with the interface of the slices that the loader reads from safetensors: `unread[...]`."""

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
    """Return all weights by name. `add` receives the numbers of bytes read.

    Floating-point weights are read as `dtype`, except for float16: transformers then keeps some weights in float32, so
    all are read in their stored dtype and the loader converts the others.
    """
    found = {}
    for name, header in checkpoint.headers.items():
        piece = TensorPiece(name, tuple(header.tensors[name]["shape"]))
        own = find_dtype(header, name)
        found[name] = LazyTensor(header, piece, dtype if own.is_floating_point and dtype != torch.float16 else own, add)
    return found
