"""The options of the `offload` group: which components are offloaded while no stage uses them."""

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

#: what a stage can use; `text_encoder` means all text encoders, `transformer` both experts
USES = ("text_encoder", "transformer", "vae")


class NoOffload:
    """Keeps everything on the device. Base class of the other options."""

    #: what is offloaded while no stage uses it
    moves: ClassVar[Collection[str]] = ()
    #: whether weights are offloaded to the host only, so that there is nothing to gain on a CPU
    needs_device: ClassVar[bool] = False

    def __init__(self) -> None:
        self.device = HOST
        self.waiting: dict[str, Offloadable] = {}

    def load_device(self, name: str, device: torch.device) -> torch.device:
        """Return the device that the module `name` is loaded to."""
        return HOST if find_use(name) in self.moves else device

    def skip_loading(self, transformer: Transformer) -> Collection[str]:
        """Return names of the transformer's modules whose weights are not read when it is loaded."""
        return ()

    def attach(
        self,
        modules: Mapping[str, nn.Module],
        device: torch.device,
        read: Callable[[str], nn.Module],
        folder: Path,
        dtype: torch.dtype,
    ) -> None:
        """Take over the modules, by their names in the checkpoint in `folder`; each is on its `load_device`.

        `read` reads a module again onto the host; `dtype` is the dtype of most weights.
        """
        self.device = device
        for name, module in modules.items():
            if find_use(name) in self.moves:
                self.waiting[name] = self.make_offloadable(module, partial(read, name), folder / name, dtype)

    def make_offloadable(
        self, module: nn.Module, read: Callable[[], nn.Module], folder: Path, dtype: torch.dtype
    ) -> Offloadable:
        """Return a wrapper that offloads a module, whose files are in `folder`, to the host.

        On a CPU there is no other memory: the weights are dropped, and `read` again.
        """
        return DiskOffloaded(module, read) if self.device.type == "cpu" else HostOffloaded(module, self.device)

    def blocks_bytes(self, sizes: Sequence[int]) -> int:
        """Return the device bytes of a transformer's blocks of these `sizes` (bytes, in order) while it denoises."""
        return sum(sizes)

    def prepare_stage(self, uses: Collection[str]) -> None:
        """Offload what the next stage does not use, then onload what it uses.

        Experts are onloaded by `load_expert`, once it is known which. A stage that uses nothing moves nothing.
        """
        if uses:
            needed = [name for name in self.waiting if find_use(name) in uses]
            self.swap(
                go=[name for name in self.waiting if name not in needed],
                come=[name for name in needed if find_use(name) != "transformer"],
            )

    def load_expert(self, expert: str) -> None:
        """Offload the other expert, if there is one, then onload the transformer `expert`."""
        experts = [name for name in self.waiting if find_use(name) == "transformer"]
        self.swap(go=[name for name in experts if name != expert], come=[name for name in experts if name == expert])

    def swap(self, go: Collection[str], come: Collection[str]) -> None:
        """Offload `go` to make room, then onload `come`."""
        leaving = [self.waiting[name] for name in go if self.waiting[name].here]
        for module in leaving:
            module.offload()
        if leaving:
            empty_cache(self.device)
        for name in come:
            self.waiting[name].onload()


class ExpertOffload(NoOffload):
    """Keeps only the expert in use on the device, and neither outside denoising.

    The experts are swapped once in each run (Wan 2.2: from high to low noise).
    """

    moves = ("transformer",)
    needs_device = True


class ModelOffload(NoOffload):
    """Keeps only what a stage uses on the device: text encoders, then the transformer (one expert), then the VAE."""

    moves = USES
    needs_device = True


class LayerwiseOffload(ModelOffload):
    """As `ModelOffload`, but while denoising only the transformer's first `resident_blocks` blocks stay on the device.

    The others are copied into `prefetch_blocks + 1` buffers shortly before they run.
    """

    def __init__(self, resident_blocks: int = 0, prefetch_blocks: int = 1) -> None:
        """Raise `UsageError` for numbers that are too small."""
        super().__init__()
        self.resident_blocks = require_at_least("offload.resident_blocks", resident_blocks, 0)
        self.prefetch_blocks = require_at_least("offload.prefetch_blocks", prefetch_blocks, 1)

    def make_offloadable(
        self, module: nn.Module, read: Callable[[], nn.Module], folder: Path, dtype: torch.dtype
    ) -> Offloadable:
        if isinstance(module, Transformer):
            # in case config.json does not state the depth
            check_offloaded_blocks(vars(self), module.depth, self.device.type)
            return HostPrefetcher(module, self.device, self.resident_blocks, self.prefetch_blocks)
        return super().make_offloadable(module, read, folder, dtype)

    def blocks_bytes(self, sizes: Sequence[int]) -> int:
        """The resident blocks and the buffers, each as large as the largest other block (`count_packed_bytes`)."""
        return sum(sizes[: self.resident_blocks]) + (self.prefetch_blocks + 1) * max(sizes[self.resident_blocks :])


class DiskOffload(NoOffload):
    """Reads the transformer's blocks from their files shortly before they run, and text encoders for each use."""

    moves = ("text_encoder", "transformer")

    def load_device(self, name: str, device: torch.device) -> torch.device:
        return device  # for everything that is loaded at all

    def skip_loading(self, transformer: Transformer) -> Collection[str]:
        return transformer.block_lists

    def make_offloadable(
        self, module: nn.Module, read: Callable[[], nn.Module], folder: Path, dtype: torch.dtype
    ) -> Offloadable:
        if isinstance(module, Transformer):
            return FilePrefetcher(module, folder, self.device, dtype)
        return DiskOffloaded(module, read, self.device)

    def blocks_bytes(self, sizes: Sequence[int]) -> int:
        """The current block and the next, at most the two largest."""
        return sum(sorted(sizes)[-2:])


class TextEncoderOffload(NoOffload):
    """Offloads the text encoders once a batch's prompts are encoded, and onloads them for the next batch."""

    moves = ("text_encoder",)


def find_use(name: str) -> str:
    """Return what stages call a component: `text_encoder_2` is a `text_encoder`, as is every name not in `USES`."""
    plain = name.rstrip("0123456789").rstrip("_")
    return plain if plain in USES else "text_encoder"
