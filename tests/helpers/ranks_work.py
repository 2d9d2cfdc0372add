"""What single ranks do in the tests of parallel methods."""

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
    """This rank's part of the outputs, by stream, and what it sent."""
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
    """`hidden` cut and put together again."""
    spread = sequence(ulysses, ring)
    return spread.gather(spread.shard(Tokens(hidden), ["hidden_states"]).hidden_states)


def held(name: str, folder: Any, chosen: dict[str, int]) -> tuple[int, int]:
    """Bytes of the blocks' weights, and of the text encoders', that this rank holds."""
    from hydrarun.engine.runner import Runner
    from tests.helpers.parallel_runs import config

    parts = Runner(config(name, folder, chosen)).built.parts
    blocks = [p for transformer in parts.experts for block in transformer.all_blocks() for p in block.parameters()]
    encoders = [module for key, module in parts.pipeline.components.items() if key.startswith("text_encoder")]
    texts = [p for module in encoders for p in module.parameters()]
    return own_bytes(blocks), own_bytes(texts)


def own_bytes(parameters: list[Any]) -> int:
    """Of a distributed tensor the local part counts."""
    local = [p.to_local() if hasattr(p, "to_local") else p for p in parameters]
    return sum(p.numel() * p.element_size() for p in local)


def predictions(ranks: int, branches: list[str]) -> tuple[dict[str, float], int, int]:
    """What every rank gets when each predicts its share; a prediction is full of its branch's number."""
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
    """Whether a layout's groups are those of the first time, and how many threads came with the others."""
    first = Mesh(degrees(ulysses_degree=2, vae_degree=2), torch.device("cpu"))
    threads = len(os.listdir("/proc/self/task"))
    others = [Mesh(degrees(ulysses_degree=2, vae_degree=2), torch.device("cpu")) for _ in range(times)]
    same = all(
        other["ulysses"].group is first["ulysses"].group and other.vae.group is first.vae.group for other in others
    )
    return same, len(os.listdir("/proc/self/task")) - threads
