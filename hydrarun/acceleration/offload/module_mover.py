"""Onload and offload a module's weights: the base of every offload.

A module keeps its identity; its parameters and buffers are replaced, and tied ones stay tied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import Tensor, nn

from hydrarun.core.device import HOST


class Offloadable(Protocol):
    """A module that is either onloaded, and ready to be called, or offloaded."""

    @property
    def here(self) -> bool:
        """Whether it is onloaded."""

    def onload(self) -> None:
        """Onload the weights; do nothing if they are onloaded."""

    def offload(self) -> None:
        """Offload the weights; do nothing if they are offloaded."""


class HostOffloaded:
    """A module whose weights stay on the host, pinned where that is faster, and are copied to the device.

    Offload costs nothing, because it only drops the copies. Tensors set while on the device are moved to the host.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        """`module` is on the host."""
        self.module = module
        self.device = device
        self.here = False
        replace_tensors(module, self.pinned)

    def onload(self) -> None:
        if not self.here:
            replace_tensors(self.module, self.on_device)
            self.here = True

    def offload(self) -> None:
        if self.here:
            replace_tensors(self.module, self.on_host)
            self.here = False

    def on_device(self, tensor: Tensor) -> Tensor:
        """Return a copy on the device that keeps a reference to its original."""
        copy = move_tensor(tensor, self.device)
        copy.copy_of = tensor
        return copy

    def on_host(self, tensor: Tensor) -> Tensor:
        """Return the original of a copy; move a tensor without an original to the host."""
        waiting = getattr(tensor, "copy_of", None)
        return self.pinned(move_tensor(tensor, HOST)) if waiting is None else waiting

    def pinned(self, tensor: Tensor) -> Tensor:
        """Return the tensor in pinned memory if the device is a GPU."""
        return wrap_like(tensor, tensor.pin_memory()) if self.device.type == "cuda" else tensor


class DiskOffloaded:
    """A module whose weights are dropped, and read again when they are needed."""

    def __init__(self, module: nn.Module, read: Callable[[], nn.Module], device: torch.device = HOST) -> None:
        """`module` has its weights on `device`; `read` returns an equal module on the host."""
        self.module = module
        self.read = read
        self.device = device
        self.here = True

    def onload(self) -> None:
        if not self.here:
            with torch.inference_mode(False):
                adopt_tensors(self.module, self.read())
            move_module(self.module, self.device)
            self.here = True

    def offload(self) -> None:
        if self.here:
            replace_tensors(self.module, make_placeholder)
            self.here = False


def move_module(module: nn.Module, device: torch.device) -> None:
    """Put the module's parameters and buffers on `device`."""
    replace_tensors(module, lambda tensor: move_tensor(tensor, device))


def replace_tensors(module: nn.Module, made: Callable[[Tensor], Tensor]) -> None:
    """Replace every parameter and buffer by `made(tensor)`; a tensor in several places is made once."""
    done: dict[int, Tensor] = {}
    with torch.inference_mode(False):  # inference tensors would make a compiled block recompile
        for part in module.modules():
            for held in (part._parameters, part._buffers):
                for name, old in held.items():
                    if old is not None:
                        if id(old) not in done:
                            done[id(old)] = made(old)
                        held[name] = done[id(old)]


def list_tensors(module: nn.Module) -> list[Tensor]:
    """Return the module's parameters and buffers, in the order in which `replace_tensors` replaces them."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    replace_tensors(module, note)
    return found


def set_tensors(module: nn.Module, new: Iterable[Tensor]) -> list[Tensor]:
    """Give the module the tensors `new`, in the order of `list_tensors`; return its old ones."""
    old: list[Tensor] = []
    coming = iter(new)

    def change(tensor: Tensor) -> Tensor:
        old.append(tensor)
        return wrap_like(tensor, next(coming))

    replace_tensors(module, change)
    return old


def adopt_tensors(module: nn.Module, other: nn.Module) -> None:
    """Give `module` the parameters and buffers of `other`, which has the same submodules."""
    for part, theirs in zip(module.modules(), other.modules(), strict=True):
        part._parameters.update(theirs._parameters)
        part._buffers.update(theirs._buffers)


def move_tensor(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the tensor itself if it is on `device`, else a copy."""
    # copies to the host block: the CPU could read them before the GPU has written them
    return wrap_like(tensor, tensor.to(device, non_blocking=device != HOST))


def make_placeholder(tensor: Tensor) -> Tensor:
    """Return a meta tensor of the same shape and dtype."""
    return wrap_like(tensor, torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"))


def wrap_like(old: Tensor, new: Tensor) -> Tensor:
    """Return `new` as a parameter if `old` is one."""
    if isinstance(new, nn.Parameter) or not isinstance(old, nn.Parameter):
        return new
    return nn.Parameter(new, requires_grad=False)
