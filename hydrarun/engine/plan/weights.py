"""What the weights of a run take on the device in each of its stages, and what waits on the host."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from hydrarun.acceleration.offload.strategies import DiskOffload, LayerwiseOffload, NoOffload, use_of
from hydrarun.acceleration.parallel.hsdp import repeated_layers, shares_weights
from hydrarun.acceleration.quantization import kept_in, takes
from hydrarun.models.layers.norm import Modulation
from hydrarun.models.transformer import Transformer


@dataclass(frozen=True)
class Part:
    """Bytes of a block, of a list's repeated layers, or of what is around them."""

    #: everything
    plain: int
    #: of it, weights that quantization takes, and how many rows (outputs) they have together
    taken: int = 0
    rows: int = 0
    #: of it, modulation weights
    modulation: int = 0

    def __add__(self, other: Part) -> Part:
        return Part(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


@dataclass(frozen=True)
class Component:
    """A transformer, text encoder or VAE."""

    name: str
    #: of the dtype that it is held in
    itemsize: int
    around: Part
    blocks: tuple[Part, ...] = ()
    #: the largest weight that quantization takes, in bytes
    largest: int = 0
    #: bytes of a row in all modulation tables
    table_row: int = 0

    @property
    def all(self) -> Part:
        return sum(self.blocks, self.around)


def of_transformer(name: str, transformer: Transformer) -> Component:
    """A transformer, or this rank's share of it."""
    kept = kept_in(transformer)
    blocks = list(transformer.all_blocks())
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    around = [(n, m, p) for n, m, p in parameters(transformer) if id(p) not in inside]
    parts = tuple(part(parameters(block), kept) for block in blocks)
    tables = [m for m in transformer.modules() if isinstance(m, Modulation)]
    largest = max((p.nbytes for block in blocks for n, m, p in parameters(block) if takes(n, m, kept)), default=0)
    itemsize = next(transformer.parameters()).dtype.itemsize
    row = sum(table.linear.out_features for table in tables) * itemsize
    return Component(name, itemsize, part(around, None), parts, largest, row)


def of_encoder(name: str, module: nn.Module) -> Component:
    """A text encoder: quantization takes the linear layers of its repeated layers."""
    layers = list(repeated_layers(module))
    inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
    around = [(n, m, p) for n, m, p in parameters(module) if id(p) not in inside]
    largest = max((p.nbytes for layer in layers for n, m, p in parameters(layer) if takes(n, m, ())), default=0)
    itemsize = max((p.dtype.itemsize for p in module.parameters()), default=0)
    return Component(
        name, itemsize, part(around, None), tuple(part(parameters(layer), ()) for layer in layers), largest
    )


def parameters(module: nn.Module) -> Iterator[tuple[str, nn.Module, torch.Tensor]]:
    """Name, owner and tensor of each parameter and buffer; tied ones once."""
    seen: set[int] = set()
    for path, owner in module.named_modules():
        for leaf, tensor in (*owner._parameters.items(), *owner._buffers.items()):
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                yield f"{path}.{leaf}", owner, tensor


def part(tensors: Iterable[tuple[str, nn.Module, torch.Tensor]], kept: Collection[str] | None) -> Part:
    """The sum; nothing is taken where `kept` is None."""
    total = Part(0)
    for name, owner, tensor in tensors:
        quantized = kept is not None and takes(name, owner, kept)
        modulation = "modulation" in name.split(".") and isinstance(owner, nn.Linear)
        total += Part(
            tensor.nbytes,
            tensor.nbytes if quantized else 0,
            tensor.shape[0] if quantized else 0,
            tensor.nbytes if modulation else 0,
        )
    return total


@dataclass(frozen=True)
class Held:
    """How weights are held: the settings that change their size."""

    #: what of `hydrarun.acceleration.offload.strategies.USES` is held in 8 bits
    quantized: frozenset[str] = frozenset()
    #: bytes that go with each row of it
    row_bytes: int = 0
    #: rows of modulation tables that stand for modulation weights; None: the weights are there
    table_rows: int | None = None
    #: ranks that share one copy
    shards: int = 1

    def size(self, component: Component, one: Part) -> int:
        """Bytes of a part."""
        size = one.plain
        if use_of(component.name) in self.quantized:
            size += one.taken // component.itemsize - one.taken + one.rows * self.row_bytes
        if self.table_rows is not None:
            size -= one.modulation
        return size

    def sizes(self, component: Component) -> tuple[int, list[int]]:
        """Bytes around the blocks, tables included, and of each block."""
        around = self.size(component, component.around) + (self.table_rows or 0) * component.table_row
        return around, [self.size(component, block) for block in component.blocks]


def here(component: Component, held: Held, offload: NoOffload) -> int:
    """Bytes of a component on the device while it is used."""
    around, blocks = held.sizes(component)
    if held.shards > 1 and component.blocks and shares_weights(component.name):
        # a share of everything; what is around the blocks whole; the block that computes and the one that comes
        return (around + sum(blocks)) // held.shards + around + 2 * max(blocks)
    if use_of(component.name) == "transformer":
        return around + offload.blocks_bytes(blocks)
    return around + sum(blocks)


def at_rest(component: Component, held: Held, offload: NoOffload) -> int:
    """Bytes of a component on the device while another is used."""
    around, blocks = held.sizes(component)
    if use_of(component.name) in offload.moves:
        return around if isinstance(offload, DiskOffload) and use_of(component.name) == "transformer" else 0
    if held.shards > 1 and component.blocks and shares_weights(component.name):
        return (around + sum(blocks)) // held.shards
    return around + sum(blocks)


def on_device(
    components: Iterable[Component], uses: Iterable[tuple[str, ...]], held: Held, offload: NoOffload
) -> list[int]:
    """Bytes of weights on the device in each stage, by what the stages use, in order."""
    components = list(components)
    found: list[int] = []
    last: tuple[str, ...] = ()
    for used in uses:
        last = used or last  # a stage that uses nothing leaves everything where it is
        at_work = [c for c in components if use_of(c.name) in last]
        resting = sum(at_rest(c, held, offload) for c in components if c not in at_work)
        found.append(resting + together(at_work, held, offload))
    return found


def together(components: list[Component], held: Held, offload: NoOffload) -> int:
    """Bytes of what a stage uses; of experts that take turns the larger."""
    sizes = {c.name: here(c, held, offload) for c in components}
    experts = [size for name, size in sizes.items() if use_of(name) == "transformer"]
    others = sum(sizes.values()) - sum(experts)
    if "transformer" not in offload.moves or not experts:
        return others + sum(experts)
    resting = [at_rest(c, held, offload) for c in components if use_of(c.name) == "transformer"]
    return others + max(experts) + sum(resting) - max(resting)


def waiting(components: Iterable[Component], held: Held, offload: NoOffload) -> int:
    """Bytes on the host of what waits there for its turn."""
    return sum(sum(held.sizes(c)[1]) + held.sizes(c)[0] for c in components if use_of(c.name) in offload.moves)


def streamed(component: Component, held: Held, offload: NoOffload) -> int:
    """Bytes of blocks that come to the device in each forward."""
    _, blocks = held.sizes(component)
    if use_of(component.name) != "transformer":
        return 0
    if isinstance(offload, LayerwiseOffload):
        return sum(blocks[offload.resident_blocks :])
    return sum(blocks) if isinstance(offload, DiskOffload) else 0
