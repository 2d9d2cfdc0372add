"""Measures work on the meta device: live bytes, floating-point operations, bytes sent to other ranks.

Meta tensors have shapes and no values, so the real code of a model of any size runs in a moment.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from hydrarun.core.distributed import collectives

META = torch.device("meta")
aten = torch.ops.aten
#: operations that read a value on the host, and operations that copy
ASKS = (aten._local_scalar_dense, aten.item, aten.is_nonzero)
COPIES = (aten._to_copy, aten.to)


#: marks an argument whose value, not only its shape, may change the result's shape
UNKNOWN = object()


class HostReadError(Exception):
    """The host read values of a meta tensor, which has none. The work that follows is the host's."""


@dataclass(frozen=True)
class Work:
    """The work of a part of a run."""

    linear_flops: float = 0.0  # matrix products and convolutions
    attention_flops: float = 0.0
    sent_bytes: float = 0.0  # to other ranks

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def __sub__(self, other: Work) -> Work:
        return self + other * -1

    def __mul__(self, times: float) -> Work:
        return Work(*(value * times for value in vars(self).values()))

    @property
    def flops(self) -> float:
        return self.linear_flops + self.attention_flops


class Meter(TorchDispatchMode):
    """Counts `live` and `peak` bytes on the meta device while it is active, and the work done there (`so_far`).

    Attention allocates only its output, as a fused kernel does.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        #: whether host tensors count too, because they represent tensors that would be on the device
        self.host_too = False
        #: the answer when code reads a boolean: whether all values are finite, or all true
        self.answer = True
        self.known: dict[int, weakref.ref] = {}  # storages that are counted or excluded, by address
        self.alive: set[weakref.ref] = set()
        self.results: dict[Any, tuple[Any, ...]] = {}
        self.sent_before = collectives.sent_bytes.total()
        self.linear_flops = self.attention_flops = 0
        #: work of blocks that are not run, which counts too
        self.extra = Work()

    def leave_out(self, module: nn.Module) -> None:
        """Exclude a module's weights, which would otherwise be counted through their views."""
        for tensor in (*module.parameters(), *module.buffers()):
            storage = tensor.untyped_storage()
            self.known[storage._cdata] = weakref.ref(storage)

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func._overloadpacket
        if packet in ASKS and args[0].is_meta:
            return self.answer if args[0].dtype == torch.bool else 1
        if packet in COPIES and is_copy_off_meta(args, kwargs):
            raise HostReadError
        if packet is aten.scaled_dot_product_attention:
            made = self.fake_attention(*args[:3])
        elif packet not in flop_registry and is_composite(func):
            with self:
                return func.decompose(*args, **kwargs)
        else:
            if packet is aten.index:
                args = (args[0], [make_full_index(index) for index in args[1]])
            made = self.run_operation(func, args, kwargs)
            self.add_flops(packet, flop_registry.get(packet), args, kwargs, made)
        for tensor in made if isinstance(made, (list, tuple)) else [made]:
            if isinstance(tensor, Tensor) and (tensor.is_meta or self.host_too):
                self.track(tensor.untyped_storage())
        return made

    def run_operation(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Run an operation. Reuse the known result shape if it has run with such arguments before."""
        key = (func, freeze_arguments(args), freeze_arguments(kwargs)) if is_pure(func) else None
        if key is None or UNKNOWN in key:
            return func(*args, **kwargs)
        if key in self.results:  # torch infers shapes in Python, which takes most of a dry forward
            shape, stride, dtype = self.results[key]
            return torch.empty_strided(shape, stride, dtype=dtype, device=META)
        made = func(*args, **kwargs)
        if isinstance(made, Tensor) and made.is_meta:
            self.results[key] = made.shape, made.stride(), made.dtype
        return made

    def fake_attention(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return a fused kernel's output. The meta device has no such kernel and would allocate all query-key pairs."""
        pairs = query[..., 0].numel() * key.shape[-2]
        self.attention_flops += 2 * pairs * (query.shape[-1] + value.shape[-1])
        return query.new_empty(*query.shape[:-1], value.shape[-1])

    def add_flops(self, packet: Any, formula: Any, args: Sequence[Any], kwargs: dict[str, Any], made: Any) -> None:
        """Count an operation's floating-point operations."""
        if formula is None:
            return
        if "attention" in packet.__name__:
            self.attention_flops += formula(*args, **kwargs, out_val=made)
        else:
            self.linear_flops += formula(*args, **kwargs, out_val=made)

    def track(self, storage: torch.UntypedStorage) -> None:
        """Count the storage as live until it is freed."""
        known = self.known.get(storage._cdata)
        if known is None or known() is not storage:  # the address of a freed storage may be reused
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            self.known[storage._cdata] = alive = weakref.ref(storage, partial(self.release, storage.nbytes()))
            self.alive.add(alive)

    def release(self, size: int, dead: weakref.ref) -> None:
        self.alive.discard(dead)
        self.live -= size

    def so_far(self) -> Work:
        """Return the work done so far."""
        sent = collectives.sent_bytes.total() - self.sent_before
        return Work(self.linear_flops, self.attention_flops, sent) + self.extra


def is_copy_off_meta(args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Return whether a copy goes from the meta device to another device."""
    places = [x for x in (*args[1:], kwargs.get("device")) if isinstance(x, torch.device)]
    return args[0].is_meta and any(place.type != "meta" for place in places)


@cache
def is_pure(func: Any) -> bool:
    """Return whether an operation modifies no input and returns new tensors."""
    return not func._schema.is_mutable and all(made.alias_info is None for made in func._schema.returns)


def freeze_arguments(value: Any) -> Any:
    """Return the parts of the arguments that determine the result's shape; `UNKNOWN` if unsure."""
    if isinstance(value, Tensor):
        return (value.shape, value.stride(), value.dtype) if value.is_meta else UNKNOWN
    if isinstance(value, dict):
        value = [*value.items()]
    if isinstance(value, (list, tuple)):
        parts = tuple(map(freeze_arguments, value))
        return UNKNOWN if UNKNOWN in parts else parts
    return (type(value), value) if isinstance(value, Hashable) else UNKNOWN  # 1 equals 1.0, but differs in type


@cache
def is_composite(func: Any) -> bool:
    """Return whether an operation is composed of other operations, which are counted instead."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


def make_full_index(index: Tensor | None) -> Tensor | None:
    """Replace a boolean mask by the indices of all its elements."""
    if index is None or index.dtype != torch.bool or not index.is_meta:
        return index
    return torch.arange(index.numel(), device=index.device)


class RepeatedBlocks:
    """Shortens a list of blocks to a few of each kind, whose work counts for all. Two suffice for peak bytes.

    Blocks are of one kind if their weights have equal names and shapes.
    """

    def __init__(self, blocks: nn.ModuleList, meter: Meter, kept: int) -> None:
        self.meter = meter
        kinds: dict[Any, list[nn.Module]] = defaultdict(list)
        for block in blocks:
            kinds[tuple((name, weight.shape) for name, weight in block.named_parameters())].append(block)
        self.times = {one: max(1.0, len(alike) / kept) for alike in kinds.values() for one in alike[:kept]}
        left = [block for block in blocks if block in self.times]
        del blocks[:]
        blocks.extend(left)
        for block in blocks:
            block.register_forward_pre_hook(self.before)
            block.register_forward_hook(self.after)

    def before(self, *_: Any) -> None:
        self.start = self.meter.so_far()

    def after(self, block: nn.Module, *_: Any) -> None:
        self.meter.extra += (self.meter.so_far() - self.start) * (self.times[block] - 1)
