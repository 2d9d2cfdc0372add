"""Tensors packed into one byte buffer, so that one copy moves them all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from hydrarun.acceleration.offload.module_mover import wrap_like

#: alignment of each tensor in bytes, that of torch's own allocations: the choice of kernels depends on it
ALIGNMENT = 512


class PackedTensors:
    """Copies of tensors in one byte buffer on the host, pinned if `device` is a GPU.

    `bytes`: the buffer, `[nbytes]` uint8; `tensors`: views into it. Quantized tensors are stored by their parts.
    """

    def __init__(self, tensors: Sequence[Tensor], device: torch.device) -> None:
        self.bytes = torch.empty(count_packed_bytes(tensors), dtype=torch.uint8, pin_memory=device.type == "cuda")
        place = BufferAllocator(self.bytes)

        def copied(part: Tensor) -> Tensor:
            without_gaps = torch.empty_like(part, device="meta")
            return place(without_gaps).copy_(part)

        self.tensors = [map_plain_tensors(tensor, copied) for tensor in tensors]

    def into(self, buffer: Tensor) -> list[Tensor]:
        """Return the tensors as views into `buffer`, to whose front `bytes` is copied."""
        place = BufferAllocator(buffer)
        return [map_plain_tensors(tensor, place) for tensor in self.tensors]


class BufferAllocator:
    """Allocates aligned tensors one after the other in a byte buffer."""

    def __init__(self, run: Tensor) -> None:
        self.run = run
        self.start = 0

    def __call__(self, tensor: Tensor) -> Tensor:
        """Return a view with the dtype, shape and strides of `tensor`."""
        bytes_ = self.run[self.start : self.start + tensor.nbytes]
        self.start += count_aligned_bytes(tensor)
        return bytes_.view(tensor.dtype).as_strided(tensor.shape, tensor.stride())


def count_packed_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the packed tensors."""
    return sum(count_aligned_bytes(part) for tensor in tensors for part in find_plain_tensors(tensor))


def count_aligned_bytes(tensor: Tensor) -> int:
    """Return the bytes from the start of a tensor to the start of the next one."""
    return -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT


def find_plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the plain tensors of a tensor: itself, or those that a quantized tensor wraps."""
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from find_plain_tensors(getattr(tensor, name))
    else:
        yield tensor


def map_plain_tensors(tensor: Tensor, made: Callable[[Tensor], Tensor]) -> Tensor:
    """Rebuild a tensor from `made(part)` of its plain tensors, in the order of `find_plain_tensors`."""
    if not is_traceable_wrapper_subclass(tensor):
        return wrap_like(tensor, made(tensor))
    names, context = tensor.__tensor_flatten__()
    inner = {name: map_plain_tensors(getattr(tensor, name), made) for name in names}
    return wrap_like(tensor, type(tensor).__tensor_unflatten__(inner, context, tensor.shape, tensor.stride()))
