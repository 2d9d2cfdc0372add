"""Weights that come to the device when they are needed and leave it again: what every offload is made of.

A module keeps its identity; its parameters and buffers are replaced, and tied ones stay tied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import Tensor, nn

from hydrarun.core.device import HOST


class Offloadable(Protocol):
    """A module that is ready to be called, or waits."""

    @property
    def here(self) -> bool:
        """Whether it is ready."""

    def onload(self) -> None:
        """Be ready; nothing happens where it is."""

    def offload(self) -> None:
        """Wait; nothing happens where it does."""


class HostOffloaded:
    """A module whose weights stay on the host, pinned where that is faster, and come to the device as copies.

    So leaving costs nothing: the copies are dropped. What a module got while it was on the device moves to the host.
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
        """A copy, which remembers what it is a copy of."""
        copy = move_tensor(tensor, self.device)
        copy.copy_of = tensor
        return copy

    def on_host(self, tensor: Tensor) -> Tensor:
        """What the copy was made of."""
        waiting = getattr(tensor, "copy_of", None)
        return self.pinned(move_tensor(tensor, HOST)) if waiting is None else waiting

    def pinned(self, tensor: Tensor) -> Tensor:
        """The tensor in memory that a GPU reads without the CPU's help."""
        return wrap_like(tensor, tensor.pin_memory()) if self.device.type == "cuda" else tensor


class DiskOffloaded:
    """A module whose weights are let go of, and are read again when they are needed."""

    def __init__(self, module: nn.Module, read: Callable[[], nn.Module], device: torch.device = HOST) -> None:
        """`module` has its weights on `device`; `read` makes another that equals it, on the host."""
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
    """Put `made(tensor)` in the place of every parameter and buffer; what stands in several places is made once."""
    done: dict[int, Tensor] = {}
    with torch.inference_mode(False):  # a compiled block would take inference tensors for others, and compile again
        for part in module.modules():
            for held in (part._parameters, part._buffers):
                for name, old in held.items():
                    if old is not None:
                        if id(old) not in done:
                            done[id(old)] = made(old)
                        held[name] = done[id(old)]


def list_tensors(module: nn.Module) -> list[Tensor]:
    """Its parameters and buffers, in the order in which `replace` makes others of them."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    replace_tensors(module, note)
    return found


def set_tensors(module: nn.Module, new: Iterable[Tensor]) -> list[Tensor]:
    """Give the module these `tensors`, in their order; returns those that it had."""
    old: list[Tensor] = []
    coming = iter(new)

    def change(tensor: Tensor) -> Tensor:
        old.append(tensor)
        return wrap_like(tensor, next(coming))

    replace_tensors(module, change)
    return old


def adopt_tensors(module: nn.Module, other: nn.Module) -> None:
    """Give `module` the parameters and buffers of `other`, which has the same parts."""
    for part, theirs in zip(module.modules(), other.modules(), strict=True):
        part._parameters.update(theirs._parameters)
        part._buffers.update(theirs._buffers)


def move_tensor(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor itself where it is on `device`, else a copy."""
    # towards the host we wait: the CPU may read at once what a GPU has not written yet
    return wrap_like(tensor, tensor.to(device, non_blocking=device != HOST))


def make_placeholder(tensor: Tensor) -> Tensor:
    """Its shape and dtype without numbers."""
    return wrap_like(tensor, torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"))


def wrap_like(old: Tensor, new: Tensor) -> Tensor:
    """`new` as what `old` is, a parameter or a buffer."""
    if isinstance(new, nn.Parameter) or not isinstance(old, nn.Parameter):
        return new
    return nn.Parameter(new, requires_grad=False)
