"""Hybrid sharded data parallel (FSDP2): each rank stores a shard of the weights and gathers the rest block by block.

Ranks that hold equal weights form replicas of `hsdp_degree` ranks; a replica's ranks share one copy. In each forward
FSDP2 sends this rank's shard of every block to the others of its replica: `(n - 1) / n` of the block's bytes.
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
    """Shard each block, then the weights outside the blocks."""
    shard_parts([*transformer.all_blocks()], transformer, mesh)


@contextmanager
def unshard_rest(transformer: Transformer) -> Iterator[None]:
    """Keep the weights outside the blocks whole on every rank, for use outside a forward. All ranks must enter."""
    if not isinstance(transformer, FSDPModule):
        yield
        return
    transformer.unshard()
    try:
        yield
    finally:
        transformer.reshard()


def is_sharded(name: str) -> bool:
    """Return whether the weights of the component `name` are sharded: those of transformers and text encoders are.

    A model that draws tokens one by one would gather all its weights for each token, and a VAE is small.
    """
    return name.startswith(("transformer", "text_encoder"))


def shard_encoder(encoder: nn.Module, mesh: Mesh) -> None:
    """Shard the repeated layers of a text encoder, then its other weights."""
    plain = encoder.__class__
    shard_parts([*find_repeated_layers(encoder)], encoder, mesh)
    if hasattr(encoder, "generate"):
        generate_as_forward(encoder, plain)
    # transformers looks up by this exact class which layers' outputs a model can return; sharding only needs hooks
    encoder.__class__ = plain


def generate_as_forward(encoder: Any, plain: type) -> None:
    """Make `generate`, which encodes pictures outside `forward`, one forward. `plain`: the class between calls."""
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
    """Apply `fully_shard` to each part and then to the whole."""
    place = mesh.hsdp()
    for module in (*parts, whole):
        fully_shard(module, mesh=place, ignored_params=find_odd_parameters(module))


def find_odd_parameters(module: nn.Module) -> set[nn.Parameter]:
    """Return the few parameters in another dtype than most. They stay whole: FSDP2 shards one dtype together."""
    parameters = list(module.parameters())
    common = max(
        {p.dtype for p in parameters}, key=lambda dtype: sum(p.numel() for p in parameters if p.dtype == dtype)
    )
    return {p for p in parameters if p.dtype != common}


def find_repeated_layers(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the elements of every `nn.ModuleList` that is not inside another one."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from find_repeated_layers(child)
