"""Layerwise offload: a block's weights are on the device only while it runs, and the next blocks' are prefetched.

A wrapper replaces each block in the transformer, so that the weights are there for every caller: our own run, gates,
cache-dit. The wrapped block itself is unchanged, compiled or not.
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
    """Replaces a block. The block has its weights inside the context `turn()`."""

    def __init__(self, block: nn.Module, turn: Callable[[], AbstractContextManager[None]]) -> None:
        super().__init__()
        self.block = block
        self.turn = turn

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Run the block."""
        with self.turn():
            return self.block(hidden_states, encoder_hidden_states, tokens)

    def modulated(self, tokens: Tokens) -> Tensor:
        """Return the block's modulated input."""
        with self.turn():
            return self.block.modulated(tokens)


class BlockPrefetcher:
    """Prefetches blocks in a ring: it holds, or is fetching, the weights of the current block and of the next `ahead`.

    A call of any other block waits for its weights.
    """

    def __init__(self, blocks: Sequence[nn.Module], ahead: int) -> None:
        self.blocks = blocks
        self.ahead = ahead
        self.held: dict[int, Any] = {}

    def fetch(self, index: int) -> Any:
        """Start to fetch a block's weights; return a handle to hold."""
        raise NotImplementedError

    def weights(self, index: int, held: Any) -> list[Tensor]:
        """Return the weights that `fetch` loaded, in the order of the block's parameters."""
        raise NotImplementedError

    def used(self, held: Any) -> None:
        """Handle the end of a block's run; the same weights may be used again next."""

    def drop(self, held: Any) -> None:
        """Release a block's weights, because it is not among the next blocks."""
        raise NotImplementedError

    @contextmanager
    def turn(self, index: int) -> Iterator[None]:
        """Give the block its weights inside the context."""
        held = self.hold(index)
        block = self.blocks[index]
        with torch.inference_mode(False):  # as in `replace_tensors`
            away = set_tensors(block, self.weights(index, held))
        try:
            yield
        finally:
            set_tensors(block, away)
            self.used(held)

    def hold(self, index: int) -> Any:
        """Drop all other blocks, then hold this block and those after it; return this block's handle."""
        count = len(self.blocks)
        wanted = [(index + step) % count for step in range(self.ahead + 1)]
        for other in self.held.keys() - set(wanted):
            self.drop(self.held.pop(other))
        for one in wanted:
            if one not in self.held:
                self.held[one] = self.fetch(one)
        return self.held[index]

    def let_go(self) -> None:
        """Drop everything that is held."""
        while self.held:
            self.drop(self.held.popitem()[1])


@dataclass
class BlockBuffer:
    """A device buffer for one block, with the events of its last use and of the last copy into it."""

    bytes: Tensor
    used: Any
    copied: Any = None


class HostPrefetcher(BlockPrefetcher):
    """A transformer whose blocks, except the first `resident`, are copied from the host into `ahead + 1` buffers.

    The buffers are used in a ring; each is as large as the largest of those blocks. The other weights are onloaded and
    offloaded as a whole.
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
            self.copies.wait(buffer.copied)  # its memory may be reused afterwards
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
    """A block's weights on the device, and the event of their copy."""

    weights: list[Tensor]
    copied: Any


class FilePrefetcher(BlockPrefetcher):
    """A transformer whose blocks are read from the files in `folder`; a thread reads the next while one computes."""

    def __init__(self, transformer: Transformer, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
        """The blocks of `transformer` are not loaded, all else is on `device`; it is changed in place."""
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
        """Do nothing: blocks are read one by one."""

    def offload(self) -> None:
        self.let_go()

    def fetch(self, index: int) -> Future[LoadedBlock]:
        return self.thread.submit(self.read_block, index, self.copies.record_compute())

    def read_block(self, index: int, after: Any) -> LoadedBlock:
        """Read a block's weights to the device, where their memory may be in use until the event `after`."""
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
            held.exception()  # waits: weights that are being read must be freed before more are read


def pack_block(block: nn.Module, device: torch.device) -> PackedTensors:
    """Pack the block's weights into one buffer and make the block use the packed ones."""
    packed = PackedTensors(list_tensors(block), device)
    set_tensors(block, packed.tensors)
    return packed


def gather_rest(transformer: Transformer, blocks: Sequence[nn.Module]) -> nn.Module:
    """Return a module that shares everything outside the transformer's blocks with it, and these `blocks`."""
    rest = nn.Module()
    rest._parameters, rest._buffers = transformer._parameters, transformer._buffers
    for name, part in transformer.named_children():
        if name not in transformer.block_lists:
            rest.add_module(name, part)
    rest.add_module("blocks", nn.ModuleList(blocks))
    return rest


def list_named_blocks(transformer: Transformer) -> Iterator[tuple[str, nn.Module]]:
    """Yield every block with its name in the transformer, in order."""
    for name in transformer.block_lists:
        for index, block in getattr(transformer, name).named_children():
            yield f"{name}.{index}", block


def wrap_blocks(turns: BlockPrefetcher, transformer: Transformer) -> None:
    """Wrap the blocks of the transformer that `turns` prefetches."""
    places = {block: index for index, block in enumerate(turns.blocks)}
    for name, block in list(list_named_blocks(transformer)):
        if block in places:
            transformer.set_submodule(name, PrefetchedBlock(block, partial(turns.turn, places[block])))
