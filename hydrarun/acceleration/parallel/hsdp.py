"""Hybrid sharded data parallel: each rank stores a share of the weights and borrows the rest, block by block (FSDP2).

Ranks that hold equal weights form replicas of `hsdp_degree` ranks; a replica's ranks share one copy. Each forward sends
of every block this rank's share to the others of its replica: `(n - 1) / n` of the block's bytes, done by FSDP2.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from hydrarun.core.distributed.mesh import Mesh
from hydrarun.models.transformer import Transformer


def shard_transformer(transformer: Transformer, mesh: Mesh) -> None:
    """Shard each block, then what is left around them."""
    shard_parts([*transformer.all_blocks()], transformer, mesh)


@contextmanager
def unshard_rest(transformer: Transformer) -> Iterator[None]:
    """What is left around the blocks is whole on every rank, for use outside of a forward; all ranks come here."""
    if not isinstance(transformer, FSDPModule):
        yield
        return
    transformer.unshard()
    try:
        yield
    finally:
        transformer.reshard()


def is_sharded(name: str) -> bool:
    """Whether ranks share the weights of the component of that name: transformers and text encoders.

    A model that draws tokens one by one would borrow all of them for each, and a VAE is small.
    """
    return name.startswith(("transformer", "text_encoder"))


def shard_encoder(encoder: nn.Module, mesh: Mesh) -> None:
    """Shard the repeated layers of a text encoder, then what is left around them."""
    plain = encoder.__class__
    shard_parts([*find_repeated_layers(encoder)], encoder, mesh)
    if hasattr(encoder, "generate"):
        generate_as_forward(encoder, plain)
    # transformers knows by this very class which layers' outputs a model can hand out; sharding hangs on hooks
    encoder.__class__ = plain


def generate_as_forward(encoder: Any, plain: type) -> None:
    """Make all of `generate`, which encodes pictures outside of `forward`, one forward; `plain`: the class between."""
    sharded = encoder.__class__
    register_fsdp_forward_method(encoder, "generate")
    registered = encoder.generate

    def generate(*args: Any, **kwargs: Any) -> Any:
        encoder.__class__ = sharded
        try:
            return registered(*args, **kwargs)
        finally:
            encoder.__class__ = plain

    encoder.generate = generate


def shard_parts(parts: list[nn.Module], whole: nn.Module, mesh: Mesh) -> None:
    """`fully_shard` each part and then the whole."""
    place = mesh.hsdp["replicate", "shard"]
    for module in (*parts, whole):
        fully_shard(module, mesh=place, ignored_params=find_odd_parameters(module))


def find_odd_parameters(module: nn.Module) -> set[nn.Parameter]:
    """Parameters in another dtype than most: FSDP2 shards one dtype together. They stay whole, and are few."""
    parameters = list(module.parameters())
    common = max(
        {p.dtype for p in parameters}, key=lambda dtype: sum(p.numel() for p in parameters if p.dtype == dtype)
    )
    return {p for p in parameters if p.dtype != common}


def find_repeated_layers(module: nn.Module) -> Iterator[nn.Module]:
    """The elements of every list of layers that is in no other list."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from find_repeated_layers(child)
