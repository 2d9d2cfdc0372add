"""Tensors side by side in one run of bytes, so that one copy moves them all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from hydrarun.acceleration.offload.module_mover import wrap_like

#: where a tensor begins is a multiple of this, as where torch allocates it by itself: kernels are chosen by it
ALIGNMENT = 512


class PackedTensors:
    """Copies of tensors on the host, in one run of bytes, pinned where `device` is faster with it.

    `bytes` are all of them `[nbytes]` uint8, `tensors` are views into them. Quantized tensors go in by their parts.
    """

    def __init__(self, tensors: Sequence[Tensor], device: torch.device) -> None:
        self.bytes = torch.empty(count_packed_bytes(tensors), dtype=torch.uint8, pin_memory=device.type == "cuda")
        place = BufferAllocator(self.bytes)

        def copied(part: Tensor) -> Tensor:
            without_gaps = torch.empty_like(part, device="meta")
            return place(without_gaps).copy_(part)

        self.tensors = [map_plain_tensors(tensor, copied) for tensor in tensors]

    def into(self, buffer: Tensor) -> list[Tensor]:
        """The tensors in a `buffer` of bytes that `bytes` are copied to the front of."""
        place = BufferAllocator(buffer)
        return [map_plain_tensors(tensor, place) for tensor in self.tensors]


class BufferAllocator:
    """Gives out, of a run of bytes, one place after the other."""

    def __init__(self, run: Tensor) -> None:
        self.run = run
        self.start = 0

    def __call__(self, tensor: Tensor) -> Tensor:
        """Room for what is like `tensor`."""
        bytes_ = self.run[self.start : self.start + tensor.nbytes]
        self.start += count_aligned_bytes(tensor)
        return bytes_.view(tensor.dtype).as_strided(tensor.shape, tensor.stride())


def count_packed_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors side by side."""
    return sum(count_aligned_bytes(part) for tensor in tensors for part in find_plain_tensors(tensor))


def count_aligned_bytes(tensor: Tensor) -> int:
    """Bytes from where a tensor begins to where the next one does."""
    return -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT


def find_plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a tensor is made of: itself, or those that a quantized one wraps."""
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from find_plain_tensors(getattr(tensor, name))
    else:
        yield tensor


def map_plain_tensors(tensor: Tensor, made: Callable[[Tensor], Tensor]) -> Tensor:
    """The same with `made` of each of its parts, in the order of `parts`."""
    if not is_traceable_wrapper_subclass(tensor):
        return wrap_like(tensor, made(tensor))
    names, context = tensor.__tensor_flatten__()
    inner = {name: map_plain_tensors(getattr(tensor, name), made) for name in names}
    return wrap_like(tensor, type(tensor).__tensor_unflatten__(inner, context, tensor.shape, tensor.stride()))
