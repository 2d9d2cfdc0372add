"""Functions for single ranks in the tests of parallel methods."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch

from hydrarun.acceleration.parallel.sequence import SequenceParallel
from hydrarun.core.distributed import collectives
from hydrarun.core.distributed.degrees import split_evenly
from hydrarun.core.distributed.mesh import Mesh
from hydrarun.models.layers.attention import Attention
from hydrarun.models.layers.tokens import Tokens
from tests.helpers.parallel_runs import degrees


def sequence(ulysses: int, ring: int) -> SequenceParallel:
    mesh = Mesh(degrees(ulysses_degree=ulysses, ring_degree=ring), torch.device("cpu"))
    return SequenceParallel(mesh["ulysses"], mesh["ring"])


def attention_over_ranks(ulysses: int, ring: int, streams: dict[str, Any], masks: dict[str, Any]) -> tuple[Any, dict]:
    """Return this rank's shard of the outputs by stream, and the bytes that it sent."""
    layer = Attention()
    layer.sequence = spread = sequence(ulysses, ring)
    tokens = Tokens(**{name: parts[0] for name, parts in streams.items()})
    spread.shard(tokens, list(streams))
    own = {
        name: tuple(x.split(split_evenly(x.shape[1], spread.size), dim=1)[spread.rank] for x in parts)
        for name, parts in streams.items()
    }
    collectives.sent_bytes.clear()
    outputs = layer(own, masks)
    return dict(zip(streams, outputs, strict=True)), dict(collectives.sent_bytes)


def gathered(ulysses: int, ring: int, hidden: torch.Tensor) -> torch.Tensor:
    """Shard `hidden` and gather it again."""
    spread = sequence(ulysses, ring)
    return spread.gather(spread.shard(Tokens(hidden), ["hidden_states"]).hidden_states)


def held(name: str, folder: Any, chosen: dict[str, int]) -> tuple[int, int]:
    """Return the bytes of block weights and of text encoder weights on this rank."""
    from hydrarun.engine.runner import Runner
    from tests.helpers.parallel_runs import config

    parts = Runner(config(name, folder, chosen)).built.parts
    blocks = [p for transformer in parts.experts for block in transformer.all_blocks() for p in block.parameters()]
    encoders = [module for key, module in parts.pipeline.components.items() if key.startswith("text_encoder")]
    texts = [p for module in encoders for p in module.parameters()]
    return own_bytes(blocks), own_bytes(texts)


def own_bytes(parameters: list[Any]) -> int:
    """Return the bytes of parameters; distributed tensors count with their local shard."""
    local = [p.to_local() if hasattr(p, "to_local") else p for p in parameters]
    return sum(p.numel() * p.element_size() for p in local)


def predictions(ranks: int, branches: list[str]) -> tuple[dict[str, float], int, int]:
    """Predict this rank's branches; return all predictions, the number of own ones, and the gathered bytes.

    The prediction of a branch is filled with the branch's index.
    """
    from hydrarun.acceleration.parallel.cfg import predict_branches

    axis = Mesh(degrees(cfg_degree=ranks), torch.device("cpu"))["cfg"]
    asked: list[str] = []

    def predict(mine: Sequence[str]) -> dict[str, torch.Tensor]:
        asked.extend(mine)
        return {branch: torch.full((2, 5, 3), float(branches.index(branch))) for branch in mine}

    collectives.sent_bytes.clear()
    found = predict_branches(branches, predict, axis, torch.zeros(2, 5, 3))
    assert all(value.unique().numel() == 1 for value in found.values())
    return (
        {branch: value[0, 0, 0].item() for branch, value in found.items()},
        len(asked),
        collectives.sent_bytes["all_gather"],
    )


def meshes_made_again(times: int) -> tuple[bool, int]:
    """Return whether further meshes of a layout reuse its groups, and how many threads they add."""
    first = Mesh(degrees(ulysses_degree=2, vae_degree=2), torch.device("cpu"))
    threads = len(os.listdir("/proc/self/task"))
    others = [Mesh(degrees(ulysses_degree=2, vae_degree=2), torch.device("cpu")) for _ in range(times)]
    same = all(
        other["ulysses"].group is first["ulysses"].group and other.vae.group is first.vae.group for other in others
    )
    return same, len(os.listdir("/proc/self/task")) - threads
