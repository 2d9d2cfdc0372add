"""What waits while no stage uses it: the options of the `offload` group."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import ClassVar

import torch
from torch import nn

from hydrarun.memory.device import empty_cache
from hydrarun.memory.moving import HOST, Moving, WaitsOnDisk, WaitsOnHost

#: what a stage can use; `text_encoder` stands for all text encoders, `transformer` for both experts
USES = ("text_encoder", "transformer", "vae")


class NoOffload:
    """Everything stays on the device; the base of the other options."""

    #: what waits while no stage uses it
    moves: ClassVar[Collection[str]] = ()
    #: whether weights wait on the host only, so that on a CPU there is nothing to gain
    needs_device: ClassVar[bool] = False

    def __init__(self) -> None:
        self.device = HOST
        self.waiting: dict[str, Moving] = {}

    def place(self, name: str, device: torch.device) -> torch.device:
        """Where the module of that name is loaded to."""
        return HOST if use_of(name) in self.moves else device

    def take(self, modules: Mapping[str, nn.Module], device: torch.device, read: Callable[[str], nn.Module]) -> None:
        """Take charge of the modules, by their names in the checkpoint, that lie where `place` said.

        They wait on the host. A CPU has no other memory: there they are let go of, and `read` reads one again.
        """
        self.device = device
        for name, module in modules.items():
            if use_of(name) in self.moves:
                if device.type == "cpu":
                    self.waiting[name] = WaitsOnDisk(module, partial(read, name))
                else:
                    self.waiting[name] = WaitsOnHost(module, device)

    def before(self, uses: Collection[str]) -> None:
        """A stage is next that uses these: what it does not use leaves, then what it uses comes.

        Experts come when it is known which (`ready`). A stage that uses nothing leaves everything where it is.
        """
        if uses:
            needed = [name for name in self.waiting if use_of(name) in uses]
            self.change(
                go=[name for name in self.waiting if name not in needed],
                come=[name for name in needed if use_of(name) != "transformer"],
            )

    def ready(self, expert: str) -> None:
        """The transformer of this name is next: the other one, if there is one, leaves before it comes."""
        experts = [name for name in self.waiting if use_of(name) == "transformer"]
        self.change(go=[name for name in experts if name != expert], come=[name for name in experts if name == expert])

    def change(self, go: Collection[str], come: Collection[str]) -> None:
        """First make room, then fill it."""
        leaving = [self.waiting[name] for name in go if self.waiting[name].here]
        for module in leaving:
            module.go()
        if leaving:
            empty_cache(self.device)
        for name in come:
            self.waiting[name].come()


class ExpertOffload(NoOffload):
    """Of two experts only the one in use is on the device, and none while there is no denoising.

    They change places once in each run (Wan 2.2: from high to low noise).
    """

    moves = ("transformer",)
    needs_device = True


class ModelOffload(NoOffload):
    """Only what a stage uses is on the device: text encoders, then the transformer (of experts one), then the VAE."""

    moves = USES
    needs_device = True


class TextEncoderOffload(NoOffload):
    """All prompts of a batch are encoded, then the text encoders leave, and come back for the next batch."""

    moves = ("text_encoder",)


def use_of(name: str) -> str:
    """What a component is to stages: `text_encoder_2` is a `text_encoder`."""
    return name.rstrip("0123456789").rstrip("_")
