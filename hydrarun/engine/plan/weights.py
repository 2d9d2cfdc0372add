"""Computes the bytes of weights on the device in each stage, and of offloaded weights on the host."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from hydrarun.acceleration.offload.strategies import DiskOffload, LayerwiseOffload, NoOffload, find_use
from hydrarun.acceleration.parallel.hsdp import find_repeated_layers, is_sharded
from hydrarun.acceleration.quantization import find_unquantized, is_quantizable
from hydrarun.models.layers.norm import Modulation
from hydrarun.models.transformer import Transformer


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of a block, of a repeated layer, or of the weights outside them."""

    #: all weights
    plain: int
    #: of these, weights that are quantized, and their total number of rows (outputs)
    taken: int = 0
    rows: int = 0
    #: of these, modulation weights
    modulation: int = 0

    def __add__(self, other: WeightBytes) -> WeightBytes:
        return WeightBytes(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


@dataclass(frozen=True)
class ComponentSize:
    """A transformer, text encoder or VAE."""

    name: str
    #: bytes of an element in the loaded dtype
    itemsize: int
    around: WeightBytes
    blocks: tuple[WeightBytes, ...] = ()
    #: bytes of the largest weight that is quantized
    largest: int = 0
    #: bytes of one row in all modulation tables together
    table_row: int = 0

    @property
    def all(self) -> WeightBytes:
        return sum(self.blocks, self.around)


def measure_transformer(name: str, transformer: Transformer) -> ComponentSize:
    """Measure a transformer, or this rank's shard of it."""
    kept = find_unquantized(transformer)
    blocks = list(transformer.all_blocks())
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    around = [(n, m, p) for n, m, p in list_parameters(transformer) if id(p) not in inside]
    parts = tuple(sum_bytes(list_parameters(block), kept) for block in blocks)
    tables = [m for m in transformer.modules() if isinstance(m, Modulation)]
    largest = max(
        (p.nbytes for block in blocks for n, m, p in list_parameters(block) if is_quantizable(n, m, kept)), default=0
    )
    itemsize = next(transformer.parameters()).dtype.itemsize
    row = sum(table.linear.out_features for table in tables) * itemsize
    return ComponentSize(name, itemsize, sum_bytes(around, None), parts, largest, row)


def measure_encoder(name: str, module: nn.Module) -> ComponentSize:
    """Measure a text encoder or VAE. Quantization applies to the linear layers of its repeated layers."""
    layers = list(find_repeated_layers(module))
    inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
    around = [(n, m, p) for n, m, p in list_parameters(module) if id(p) not in inside]
    largest = max(
        (p.nbytes for layer in layers for n, m, p in list_parameters(layer) if is_quantizable(n, m, ())), default=0
    )
    itemsize = max((p.dtype.itemsize for p in module.parameters()), default=0)
    return ComponentSize(
        name,
        itemsize,
        sum_bytes(around, None),
        tuple(sum_bytes(list_parameters(layer), ()) for layer in layers),
        largest,
    )


def list_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Module, torch.Tensor]]:
    """Yield name, owner and tensor of each parameter and buffer; tied tensors once."""
    seen: set[int] = set()
    for path, owner in module.named_modules():
        for leaf, tensor in (*owner._parameters.items(), *owner._buffers.items()):
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                yield f"{path}.{leaf}", owner, tensor


def sum_bytes(tensors: Iterable[tuple[str, nn.Module, torch.Tensor]], kept: Collection[str] | None) -> WeightBytes:
    """Sum the bytes. Nothing is quantized if `kept` is None."""
    total = WeightBytes(0)
    for name, owner, tensor in tensors:
        quantized = kept is not None and is_quantizable(name, owner, kept)
        modulation = "modulation" in name.split(".") and isinstance(owner, nn.Linear)
        total += WeightBytes(
            tensor.nbytes,
            tensor.nbytes if quantized else 0,
            tensor.shape[0] if quantized else 0,
            tensor.nbytes if modulation else 0,
        )
    return total


@dataclass(frozen=True)
class WeightLayout:
    """The settings that change the size of weights."""

    #: entries of `hydrarun.acceleration.offload.strategies.USES` that are quantized to 8 bits
    quantized: frozenset[str] = frozenset()
    #: additional bytes for each row of a quantized weight
    row_bytes: int = 0
    #: rows of the modulation tables that replace the modulation weights; None: the weights are loaded
    table_rows: int | None = None
    #: number of ranks that share one copy (HSDP)
    shards: int = 1

    def size(self, component: ComponentSize, one: WeightBytes) -> int:
        """Return the bytes of one part of `component`."""
        size = one.plain
        if find_use(component.name) in self.quantized:
            size += one.taken // component.itemsize - one.taken + one.rows * self.row_bytes
        if self.table_rows is not None:
            size -= one.modulation
        return size

    def count_sizes(self, component: ComponentSize) -> tuple[int, list[int]]:
        """Return the bytes outside the blocks, tables included, and those of each block."""
        around = self.size(component, component.around) + (self.table_rows or 0) * component.table_row
        return around, [self.size(component, block) for block in component.blocks]


def count_active_bytes(component: ComponentSize, held: WeightLayout, offload: NoOffload) -> int:
    """Return a component's bytes on the device while it is in use."""
    around, blocks = held.count_sizes(component)
    if held.shards > 1 and component.blocks and is_sharded(component.name):
        # the shard of all weights, the whole weights outside the blocks, and the current and the next block
        return (around + sum(blocks)) // held.shards + around + 2 * max(blocks)
    if find_use(component.name) == "transformer":
        return around + offload.blocks_bytes(blocks)
    return around + sum(blocks)


def count_idle_bytes(component: ComponentSize, held: WeightLayout, offload: NoOffload) -> int:
    """Return a component's bytes on the device while another one is in use."""
    around, blocks = held.count_sizes(component)
    if find_use(component.name) in offload.moves:
        return around if isinstance(offload, DiskOffload) and find_use(component.name) == "transformer" else 0
    if held.shards > 1 and component.blocks and is_sharded(component.name):
        return (around + sum(blocks)) // held.shards
    return around + sum(blocks)


def list_device_bytes(
    components: Iterable[ComponentSize], uses: Iterable[tuple[str, ...]], held: WeightLayout, offload: NoOffload
) -> list[int]:
    """Return the bytes of weights on the device in each stage. `uses`: what each stage uses, in order."""
    components = list(components)
    found: list[int] = []
    last: tuple[str, ...] = ()
    for used in uses:
        last = used or last  # a stage that uses nothing moves nothing
        at_work = [c for c in components if find_use(c.name) in last]
        resting = sum(count_idle_bytes(c, held, offload) for c in components if c not in at_work)
        found.append(resting + count_stage_bytes(at_work, held, offload))
    return found


def count_stage_bytes(components: list[ComponentSize], held: WeightLayout, offload: NoOffload) -> int:
    """Return the bytes of the components in use. If experts are swapped, only one is active at a time."""
    sizes = {c.name: count_active_bytes(c, held, offload) for c in components}
    experts = [size for name, size in sizes.items() if find_use(name) == "transformer"]
    others = sum(sizes.values()) - sum(experts)
    if "transformer" not in offload.moves or not experts:
        return others + sum(experts)
    resting = [count_idle_bytes(c, held, offload) for c in components if find_use(c.name) == "transformer"]
    return others + max(experts) + sum(resting) - max(resting)


def count_host_bytes(components: Iterable[ComponentSize], held: WeightLayout, offload: NoOffload) -> int:
    """Return the bytes of offloaded components on the host."""
    return sum(
        sum(held.count_sizes(c)[1]) + held.count_sizes(c)[0] for c in components if find_use(c.name) in offload.moves
    )


def count_streamed_bytes(component: ComponentSize, held: WeightLayout, offload: NoOffload) -> int:
    """Return the bytes of blocks that are copied to the device in each forward."""
    _, blocks = held.count_sizes(component)
    if find_use(component.name) != "transformer":
        return 0
    if isinstance(offload, LayerwiseOffload):
        return sum(blocks[offload.resident_blocks :])
    return sum(blocks) if isinstance(offload, DiskOffload) else 0
