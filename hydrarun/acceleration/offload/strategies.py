"""What waits while no stage uses it: the options of the `offload` group."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from hydrarun.acceleration.offload.layerwise import FilePrefetcher, HostPrefetcher
from hydrarun.acceleration.offload.module_mover import DiskOffloaded, HostOffloaded, Offloadable
from hydrarun.config.checks.checkpoint import check_offloaded_blocks
from hydrarun.core.device import HOST, empty_cache
from hydrarun.core.errors import require_at_least
from hydrarun.models.transformer import Transformer

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
        self.waiting: dict[str, Offloadable] = {}

    def load_device(self, name: str, device: torch.device) -> torch.device:
        """Where the module of that name is loaded to."""
        return HOST if find_use(name) in self.moves else device

    def skip_loading(self, transformer: Transformer) -> Collection[str]:
        """Names of the transformer's modules whose weights are not read when it is loaded."""
        return ()

    def attach(
        self,
        modules: Mapping[str, nn.Module],
        device: torch.device,
        read: Callable[[str], nn.Module],
        folder: Path,
        dtype: torch.dtype,
    ) -> None:
        """Take charge of the modules, by their names in the checkpoint in `folder`, that lie where `load_device` said.

        `read` reads one again onto the host; `dtype` is what most weights are held in.
        """
        self.device = device
        for name, module in modules.items():
            if find_use(name) in self.moves:
                self.waiting[name] = self.make_offloadable(module, partial(read, name), folder / name, dtype)

    def make_offloadable(
        self, module: nn.Module, read: Callable[[], nn.Module], folder: Path, dtype: torch.dtype
    ) -> Offloadable:
        """What has a module, whose files are in `folder`, wait: the host.

        A CPU has no other memory: there it is let go of, and `read` again.
        """
        return DiskOffloaded(module, read) if self.device.type == "cpu" else HostOffloaded(module, self.device)

    def blocks_bytes(self, sizes: Sequence[int]) -> int:
        """What a transformer's blocks of these `sizes` (bytes, in order) take on the device while it denoises."""
        return sum(sizes)

    def prepare_stage(self, uses: Collection[str]) -> None:
        """A stage is next that uses these: what it does not use leaves, then what it uses comes.

        Experts come when it is known which (`load_expert`). A stage that uses nothing leaves everything where it is.
        """
        if uses:
            needed = [name for name in self.waiting if find_use(name) in uses]
            self.swap(
                go=[name for name in self.waiting if name not in needed],
                come=[name for name in needed if find_use(name) != "transformer"],
            )

    def load_expert(self, expert: str) -> None:
        """The transformer of this name is next: the other one, if there is one, leaves before it comes."""
        experts = [name for name in self.waiting if find_use(name) == "transformer"]
        self.swap(go=[name for name in experts if name != expert], come=[name for name in experts if name == expert])

    def swap(self, go: Collection[str], come: Collection[str]) -> None:
        """First make room, then fill it."""
        leaving = [self.waiting[name] for name in go if self.waiting[name].here]
        for module in leaving:
            module.offload()
        if leaving:
            empty_cache(self.device)
        for name in come:
            self.waiting[name].onload()


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


class LayerwiseOffload(ModelOffload):
    """As `ModelOffload`, and of the transformer's blocks only the first `resident_blocks` stay while it denoises.

    The others are copied into `prefetch_blocks + 1` buffers, each when its turn is near.
    """

    def __init__(self, resident_blocks: int = 0, prefetch_blocks: int = 1) -> None:
        """Raises `UsageError` for numbers that cannot be."""
        super().__init__()
        self.resident_blocks = require_at_least("offload.resident_blocks", resident_blocks, 0)
        self.prefetch_blocks = require_at_least("offload.prefetch_blocks", prefetch_blocks, 1)

    def make_offloadable(
        self, module: nn.Module, read: Callable[[], nn.Module], folder: Path, dtype: torch.dtype
    ) -> Offloadable:
        if isinstance(module, Transformer):
            check_offloaded_blocks(vars(self), module.depth)  # where config.json does not tell it
            return HostPrefetcher(module, self.device, self.resident_blocks, self.prefetch_blocks)
        return super().make_offloadable(module, read, folder, dtype)

    def blocks_bytes(self, sizes: Sequence[int]) -> int:
        """The resident ones and the buffers, each as large as the largest of the others, packed (`packed_bytes`)."""
        return sum(sizes[: self.resident_blocks]) + (self.prefetch_blocks + 1) * max(sizes[self.resident_blocks :])


class DiskOffload(NoOffload):
    """The transformer's blocks are read from their files, each when its turn is near; of text encoders the same."""

    moves = ("text_encoder", "transformer")

    def load_device(self, name: str, device: torch.device) -> torch.device:
        return device  # what is there at all

    def skip_loading(self, transformer: Transformer) -> Collection[str]:
        return transformer.block_lists

    def make_offloadable(
        self, module: nn.Module, read: Callable[[], nn.Module], folder: Path, dtype: torch.dtype
    ) -> Offloadable:
        if isinstance(module, Transformer):
            return FilePrefetcher(module, folder, self.device, dtype)
        return DiskOffloaded(module, read, self.device)

    def blocks_bytes(self, sizes: Sequence[int]) -> int:
        """The one in use and the next, at most the two largest."""
        return sum(sorted(sizes)[-2:])


class TextEncoderOffload(NoOffload):
    """All prompts of a batch are encoded, then the text encoders leave, and come back for the next batch."""

    moves = ("text_encoder",)


def find_use(name: str) -> str:
    """What a component is to stages: `text_encoder_2` is a `text_encoder`, and so is what a pipeline has behind it."""
    plain = name.rstrip("0123456789").rstrip("_")
    return plain if plain in USES else "text_encoder"
