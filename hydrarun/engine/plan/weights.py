"""What the weights of a run take on the device in each of its stages, and what waits on the host."""

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
    """Bytes of a block, of a list's repeated layers, or of what is around them."""

    #: everything
    plain: int
    #: of it, weights that quantization takes, and how many rows (outputs) they have together
    taken: int = 0
    rows: int = 0
    #: of it, modulation weights
    modulation: int = 0

    def __add__(self, other: WeightBytes) -> WeightBytes:
        return WeightBytes(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


@dataclass(frozen=True)
class ComponentSize:
    """A transformer, text encoder or VAE."""

    name: str
    #: of the dtype that it is held in
    itemsize: int
    around: WeightBytes
    blocks: tuple[WeightBytes, ...] = ()
    #: the largest weight that quantization takes, in bytes
    largest: int = 0
    #: bytes of a row in all modulation tables
    table_row: int = 0

    @property
    def all(self) -> WeightBytes:
        return sum(self.blocks, self.around)


def measure_transformer(name: str, transformer: Transformer) -> ComponentSize:
    """A transformer, or this rank's share of it."""
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
    """A text encoder: quantization takes the linear layers of its repeated layers."""
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
    """Name, owner and tensor of each parameter and buffer; tied ones once."""
    seen: set[int] = set()
    for path, owner in module.named_modules():
        for leaf, tensor in (*owner._parameters.items(), *owner._buffers.items()):
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                yield f"{path}.{leaf}", owner, tensor


def sum_bytes(tensors: Iterable[tuple[str, nn.Module, torch.Tensor]], kept: Collection[str] | None) -> WeightBytes:
    """The sum; nothing is taken where `kept` is None."""
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
    """How weights are held: the settings that change their size."""

    #: what of `hydrarun.acceleration.offload.strategies.USES` is held in 8 bits
    quantized: frozenset[str] = frozenset()
    #: bytes that go with each row of it
    row_bytes: int = 0
    #: rows of modulation tables that stand for modulation weights; None: the weights are there
    table_rows: int | None = None
    #: ranks that share one copy
    shards: int = 1

    def size(self, component: ComponentSize, one: WeightBytes) -> int:
        """Bytes of a part."""
        size = one.plain
        if find_use(component.name) in self.quantized:
            size += one.taken // component.itemsize - one.taken + one.rows * self.row_bytes
        if self.table_rows is not None:
            size -= one.modulation
        return size

    def count_sizes(self, component: ComponentSize) -> tuple[int, list[int]]:
        """Bytes around the blocks, tables included, and of each block."""
        around = self.size(component, component.around) + (self.table_rows or 0) * component.table_row
        return around, [self.size(component, block) for block in component.blocks]


def count_active_bytes(component: ComponentSize, held: WeightLayout, offload: NoOffload) -> int:
    """Bytes of a component on the device while it is used."""
    around, blocks = held.count_sizes(component)
    if held.shards > 1 and component.blocks and is_sharded(component.name):
        # a share of everything; what is around the blocks whole; the block that computes and the one that comes
        return (around + sum(blocks)) // held.shards + around + 2 * max(blocks)
    if find_use(component.name) == "transformer":
        return around + offload.blocks_bytes(blocks)
    return around + sum(blocks)


def count_idle_bytes(component: ComponentSize, held: WeightLayout, offload: NoOffload) -> int:
    """Bytes of a component on the device while another is used."""
    around, blocks = held.count_sizes(component)
    if find_use(component.name) in offload.moves:
        return around if isinstance(offload, DiskOffload) and find_use(component.name) == "transformer" else 0
    if held.shards > 1 and component.blocks and is_sharded(component.name):
        return (around + sum(blocks)) // held.shards
    return around + sum(blocks)


def list_device_bytes(
    components: Iterable[ComponentSize], uses: Iterable[tuple[str, ...]], held: WeightLayout, offload: NoOffload
) -> list[int]:
    """Bytes of weights on the device in each stage, by what the stages use, in order."""
    components = list(components)
    found: list[int] = []
    last: tuple[str, ...] = ()
    for used in uses:
        last = used or last  # a stage that uses nothing leaves everything where it is
        at_work = [c for c in components if find_use(c.name) in last]
        resting = sum(count_idle_bytes(c, held, offload) for c in components if c not in at_work)
        found.append(resting + count_stage_bytes(at_work, held, offload))
    return found


def count_stage_bytes(components: list[ComponentSize], held: WeightLayout, offload: NoOffload) -> int:
    """Bytes of what a stage uses; of experts that take turns the larger."""
    sizes = {c.name: count_active_bytes(c, held, offload) for c in components}
    experts = [size for name, size in sizes.items() if find_use(name) == "transformer"]
    others = sum(sizes.values()) - sum(experts)
    if "transformer" not in offload.moves or not experts:
        return others + sum(experts)
    resting = [count_idle_bytes(c, held, offload) for c in components if find_use(c.name) == "transformer"]
    return others + max(experts) + sum(resting) - max(resting)


def count_host_bytes(components: Iterable[ComponentSize], held: WeightLayout, offload: NoOffload) -> int:
    """Bytes on the host of what waits there for its turn."""
    return sum(
        sum(held.count_sizes(c)[1]) + held.count_sizes(c)[0] for c in components if find_use(c.name) in offload.moves
    )


def count_streamed_bytes(component: ComponentSize, held: WeightLayout, offload: NoOffload) -> int:
    """Bytes of blocks that come to the device in each forward."""
    _, blocks = held.count_sizes(component)
    if find_use(component.name) != "transformer":
        return 0
    if isinstance(offload, LayerwiseOffload):
        return sum(blocks[offload.resident_blocks :])
    return sum(blocks) if isinstance(offload, DiskOffload) else 0
