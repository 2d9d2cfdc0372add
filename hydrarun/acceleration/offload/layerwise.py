"""Blocks whose weights come for their turn and leave after it, the next ones meanwhile being fetched.

A wrapper takes a block's place in the transformer, so that whoever calls it has its weights there: our own run, gates,
cache-dit. The block inside stays itself, compiled or not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hydrarun.acceleration.offload.module_mover import HostOffloaded, list_tensors, set_tensors
from hydrarun.acceleration.offload.packed_tensors import PackedTensors
from hydrarun.core.device import CopyStream
from hydrarun.models.layers.tokens import Tokens
from hydrarun.models.transformer import Transformer
from hydrarun.models.weights.loader import find_parameter_dtype, find_placement, read_parameter
from hydrarun.models.weights.safetensors import Checkpoint


class PrefetchedBlock(nn.Module):
    """Takes a block's place; `turn()` has its weights there for as long as it is entered."""

    def __init__(self, block: nn.Module, turn: Callable[[], AbstractContextManager[None]]) -> None:
        super().__init__()
        self.block = block
        self.turn = turn

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """As the block."""
        with self.turn():
            return self.block(hidden_states, encoder_hidden_states, tokens)

    def modulated(self, tokens: Tokens) -> Tensor:
        """As the block."""
        with self.turn():
            return self.block.modulated(tokens)


class BlockPrefetcher:
    """Blocks in a circle: what the one in use and the next `ahead` need is held, and is being fetched before its turn.

    Whoever asks for another than the next one waits for it.
    """

    def __init__(self, blocks: Sequence[nn.Module], ahead: int) -> None:
        self.blocks = blocks
        self.ahead = ahead
        self.held: dict[int, Any] = {}

    def fetch(self, index: int) -> Any:
        """Begin to bring a block's weights."""
        raise NotImplementedError

    def weights(self, index: int, held: Any) -> list[Tensor]:
        """What `fetch` brought, in the order of the block's parameters."""
        raise NotImplementedError

    def used(self, held: Any) -> None:
        """The block's turn is over; the next one may be its own again."""

    def drop(self, held: Any) -> None:
        """The block is not among the next."""
        raise NotImplementedError

    @contextmanager
    def turn(self, index: int) -> Iterator[None]:
        """The block has its weights."""
        held = self.hold(index)
        block = self.blocks[index]
        with torch.inference_mode(False):  # as `replace`
            away = set_tensors(block, self.weights(index, held))
        try:
            yield
        finally:
            set_tensors(block, away)
            self.used(held)

    def hold(self, index: int) -> Any:
        """Hold it and those after it; first let go of all others."""
        count = len(self.blocks)
        wanted = [(index + step) % count for step in range(self.ahead + 1)]
        for other in self.held.keys() - set(wanted):
            self.drop(self.held.pop(other))
        for one in wanted:
            if one not in self.held:
                self.held[one] = self.fetch(one)
        return self.held[index]

    def let_go(self) -> None:
        """Hold nothing."""
        while self.held:
            self.drop(self.held.popitem()[1])


@dataclass
class BlockBuffer:
    """Room for one block on the device; the moments when what was copied into it is there, and when it was used."""

    bytes: Tensor
    used: Any
    copied: Any = None


class HostPrefetcher(BlockPrefetcher):
    """A transformer whose blocks, but for the first `resident`, are copied from the host into `ahead + 1` buffers.

    They turn in a circle, each as large as the largest of those blocks. What is left comes and goes as a whole.
    """

    def __init__(self, transformer: Transformer, device: torch.device, resident: int, ahead: int) -> None:
        """`transformer` is on the host; it is changed in place."""
        blocks = [*transformer.all_blocks()]
        super().__init__(blocks[resident:], ahead)
        self.device = device
        self.copies = CopyStream(device)
        self.packed = [pack_block(block, device) for block in self.blocks]
        self.around = HostOffloaded(gather_rest(transformer, blocks[:resident]), device)
        self.free: list[BlockBuffer] = []
        wrap_blocks(self, transformer)

    @property
    def here(self) -> bool:
        return self.around.here

    def onload(self) -> None:
        if not self.here:
            self.around.onload()
            size = max(len(packed.bytes) for packed in self.packed)
            with torch.inference_mode(False):
                rooms = [torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(self.ahead + 1)]
            self.free = [BlockBuffer(room, self.copies.record_compute()) for room in rooms]

    def offload(self) -> None:
        self.let_go()
        for buffer in self.free:
            self.copies.wait(buffer.copied)  # its memory will be another's
        self.free = []
        self.around.offload()

    def fetch(self, index: int) -> BlockBuffer:
        buffer, source = self.free.pop(), self.packed[index].bytes
        buffer.copied = self.copies.copy(source, buffer.bytes[: len(source)], after=buffer.used)
        return buffer

    def weights(self, index: int, held: BlockBuffer) -> list[Tensor]:
        self.copies.wait(held.copied)
        return self.packed[index].into(held.bytes)

    def used(self, held: BlockBuffer) -> None:
        held.used = self.copies.record_compute()

    def drop(self, held: BlockBuffer) -> None:
        self.free.append(held)


class LoadedBlock(NamedTuple):
    """A block's weights on the device, and the moment when they are there."""

    weights: list[Tensor]
    copied: Any


class FilePrefetcher(BlockPrefetcher):
    """A transformer whose blocks are read from the files in `folder`, the next one by a thread while one computes."""

    def __init__(self, transformer: Transformer, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
        """The blocks of `transformer` were not loaded, all else is on `device`; it is changed in place."""
        super().__init__([*transformer.all_blocks()], ahead=1)
        self.device = device
        self.copies = CopyStream(device)
        self.checkpoint = Checkpoint(folder)
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="blocks")
        self.sources = [
            [
                (find_placement(transformer, key, tuple(weight.shape)), find_parameter_dtype(transformer, key, dtype))
                for key, weight in block.named_parameters(prefix=name)
            ]
            for name, block in list_named_blocks(transformer)
        ]
        wrap_blocks(self, transformer)

    @property
    def here(self) -> bool:
        return bool(self.held)

    def onload(self) -> None:
        """Blocks come one by one."""

    def offload(self) -> None:
        self.let_go()

    def fetch(self, index: int) -> Future[LoadedBlock]:
        return self.thread.submit(self.read_block, index, self.copies.record_compute())

    def read_block(self, index: int, after: Any) -> LoadedBlock:
        """The block's weights on the device, whose memory may be in use until `after`."""
        with self.copies.copy_after(after):
            weights = [
                read_parameter(source, self.checkpoint, self.device, dtype) for source, dtype in self.sources[index]
            ]
        return LoadedBlock(weights, self.copies.record_copy())

    def weights(self, index: int, held: Future[LoadedBlock]) -> list[Tensor]:
        read = held.result()
        self.copies.wait(read.copied)
        return read.weights

    def drop(self, held: Future[LoadedBlock]) -> None:
        if not held.cancel():
            held.exception()  # waits: what is being read must be gone before more is


def pack_block(block: nn.Module, device: torch.device) -> PackedTensors:
    """The block's weights side by side, from now on the block's own."""
    packed = PackedTensors(list_tensors(block), device)
    set_tensors(block, packed.tensors)
    return packed


def gather_rest(transformer: Transformer, blocks: Sequence[nn.Module]) -> nn.Module:
    """All of a transformer but its blocks, and these `blocks`, as one module that shares the parts with it."""
    rest = nn.Module()
    rest._parameters, rest._buffers = transformer._parameters, transformer._buffers
    for name, part in transformer.named_children():
        if name not in transformer.block_lists:
            rest.add_module(name, part)
    rest.add_module("blocks", nn.ModuleList(blocks))
    return rest


def list_named_blocks(transformer: Transformer) -> Iterator[tuple[str, nn.Module]]:
    """Every block with its name in the transformer, in order."""
    for name in transformer.block_lists:
        for index, block in getattr(transformer, name).named_children():
            yield f"{name}.{index}", block


def wrap_blocks(turns: BlockPrefetcher, transformer: Transformer) -> None:
    """Wrap those blocks of the transformer that take turns."""
    places = {block: index for index, block in enumerate(turns.blocks)}
    for name, block in list(list_named_blocks(transformer)):
        if block in places:
            transformer.set_submodule(name, PrefetchedBlock(block, partial(turns.turn, places[block])))
