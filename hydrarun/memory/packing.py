"""Tensors side by side in one run of bytes, so that one copy moves them all."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from hydrarun.memory.moving import like

#: where a tensor begins is a multiple of this, as where torch allocates it by itself: kernels are chosen by it
ALIGNMENT = 512


class Packed:
    """Copies of tensors on the host, in one run of bytes, pinned where `device` is faster with it.

    `bytes` are all of them `[nbytes]` uint8, `tensors` are views into them. Quantized tensors go in by their parts.
    """

    def __init__(self, tensors: Sequence[Tensor], device: torch.device) -> None:
        self.bytes = torch.empty(packed_bytes(tensors), dtype=torch.uint8, pin_memory=device.type == "cuda")
        place = Places(self.bytes)
        self.tensors = [mapped(tensor, lambda part: place(part).copy_(part)) for tensor in tensors]

    def into(self, buffer: Tensor) -> list[Tensor]:
        """The tensors in a `buffer` of bytes that `bytes` are copied to the front of."""
        place = Places(buffer)
        return [mapped(tensor, place) for tensor in self.tensors]


class Places:
    """Gives out, of a run of bytes, one place after the other."""

    def __init__(self, run: Tensor) -> None:
        self.run = run
        self.start = 0

    def __call__(self, tensor: Tensor) -> Tensor:
        """Room for what is like `tensor`."""
        end = self.start + tensor.nbytes
        strides = torch.empty_like(tensor, device="meta").stride()  # its own, but where it has gaps
        place = self.run[self.start : end].view(tensor.dtype).as_strided(tensor.shape, strides)
        self.start += room(tensor)
        return place


def packed_bytes(tensors: Sequence[Tensor]) -> int:
    """Bytes of the tensors side by side."""
    sizes: list[int] = []
    for tensor in tensors:
        mapped(tensor, lambda part: sizes.append(room(part)) or part)
    return sum(sizes)


def room(tensor: Tensor) -> int:
    """Bytes from where a tensor begins to where the next one does."""
    return -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT


def mapped(tensor: Tensor, made: Callable[[Tensor], Tensor]) -> Tensor:
    """`made(tensor)`, or of a tensor that wraps others (a quantized one) the same around `made` of each."""
    if not is_traceable_wrapper_subclass(tensor):
        return like(tensor, made(tensor))
    names, context = tensor.__tensor_flatten__()
    parts = {name: mapped(getattr(tensor, name), made) for name in names}
    return like(tensor, type(tensor).__tensor_unflatten__(parts, context, tensor.shape, tensor.stride()))
