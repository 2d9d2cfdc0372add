"""What the ranks of a test do: build a model option once, then draw in one layout after the other."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from hydrarun.config.schema import Parallel
from hydrarun.core.distributed import collectives
from hydrarun.core.distributed.mesh import Mesh
from hydrarun.core.timing import Timings
from hydrarun.engine.build import shard
from hydrarun.engine.runner import Runner
from tests.helpers import subjects

CPU = torch.device("cpu")
#: how tokens, branches and pictures are spread; the others change what is loaded
LIGHT = ("data_degree", "cfg_degree", "ring_degree", "ulysses_degree")


def degrees(**chosen: int) -> dict[str, int]:
    return {**vars(Parallel()), **chosen}


def config(name: str, folder: Path, chosen: dict[str, int], *more: str) -> dict[str, Any]:
    return {**composed(name, folder, *more), "parallel": degrees(**chosen)}


@cache
def composed(name: str, folder: Path, *more: str) -> dict[str, Any]:
    """The configuration of a small run in one process."""
    from hydrarun.config.compose import compose_config

    return compose_config([*subjects.command(name, folder), *more])


#: what this process' VAEs have encoded, by model
encoded: dict[str, dict[bytes, Any]] = defaultdict(dict)


def built(name: str, folder: Path, chosen: dict[str, int]) -> Runner:
    """A new runner. Encoding is remembered from one to the next, but where ranks do it together."""
    runner = Runner(config(name, folder, chosen))
    if chosen.get("vae_degree", 1) == 1:
        vae = runner.built.parts.pipeline.vae
        vae.encode = subjects.remembering(vae.encode, encoded[name])
    return runner


@cache
def plain(name: str, folder: Path) -> Runner:
    """A runner as in one process."""
    return built(name, folder, {})


def runner_for(name: str, folder: Path, chosen: dict[str, int]) -> Runner:
    """The runner in this layout; where only tokens, branches or pictures are spread, the same weights serve."""
    if set(chosen) - set(LIGHT):
        return built(name, folder, chosen)
    runner = plain(name, folder)
    mesh = Mesh(degrees(**chosen), CPU)
    runner.built.parts.mesh = mesh
    for transformer in runner.built.parts.experts:
        transformer.shard_tokens(None)
        shard(transformer, mesh)
    return runner


def draw(name: str, folder: Path, chosen: dict[str, int], images: int, fields: dict[str, Any]) -> tuple[Any, Any, dict]:
    """Frames of all pictures, latents of this rank's own, bytes sent."""
    from hydrarun.pipeline.request import make_state

    runner = runner_for(name, folder, chosen)
    collectives.sent_bytes.clear()
    sampling = {**runner.config["sampling"], **fields}
    state = runner.draw(make_state(sampling, subjects.pictures(images, runner.config)), Timings(CPU))
    return state.frames, state.latents.numpy(), dict(collectives.sent_bytes)


def text_of_first() -> str:
    """What every rank has of what rank 0 says."""
    import torch.distributed as dist

    return collectives.broadcast_text("" if dist.get_rank() else "a cat, 一只猫", CPU)


def draw_cached(
    name: str, folder: Path, chosen: dict[str, int], cache_node: dict[str, Any], images: int, fields: dict[str, Any]
) -> tuple[Any, dict[str, Any], int]:
    """Latents of this rank's own pictures, its cache's record, bytes that it sent in sums."""
    from hydrarun.pipeline.request import make_state

    runner = runner_for(name, folder, chosen)
    collectives.sent_bytes.clear()
    state = make_state({**runner.config["sampling"], **fields}, subjects.pictures(images, runner.config))
    latents = runner.draw(state, Timings(CPU), cache_node).latents.numpy()
    return latents, runner.built.parts.cache.record(), collectives.sent_bytes["all_reduce"]


def draw_with(name: str, folder: Path, chosen: dict[str, int], fields: dict[str, Any], *more: str) -> Any:
    """Latents of a run with more words on its command line."""
    from hydrarun.pipeline.request import make_state

    runner = Runner(config(name, folder, chosen, *more))
    state = make_state({**runner.config["sampling"], **fields}, [])
    return runner.draw(state, Timings(CPU)).latents.numpy()


def draw_compiled(name: str, folder: Path, chosen: dict[str, int], images: int, fields: dict[str, Any]) -> Any:
    """Latents with every block traced; the graph breaks where ranks talk."""
    from hydrarun.pipeline.request import make_state

    torch._dynamo.reset()
    runner = Runner(config(name, folder, chosen))
    for transformer in runner.built.parts.experts:
        for block in transformer.all_blocks():
            block.compile(fullgraph=False, backend="eager", dynamic=False)
    state = make_state({**runner.config["sampling"], **fields}, subjects.pictures(images, runner.config))
    return runner.draw(state, Timings(CPU)).latents.numpy()


def draw_tabled(
    name: str, folder: Path, chosen: dict[str, int], images: int, fields: dict[str, Any]
) -> tuple[Any, int]:
    """Latents of this rank's own pictures, drawn with modulation tables, and how many rows the tables have."""
    from hydrarun.pipeline.request import make_state

    offload = {"_target_": "hydrarun.acceleration.offload.modulation_tables.ModulationOffload"}
    runner = Runner({**config(name, folder, chosen), "offload": offload})
    state = make_state({**runner.config["sampling"], **fields}, subjects.pictures(images, runner.config))
    latents = runner.draw(state, Timings(CPU)).latents.numpy()
    return latents, len(runner.built.parts.tables["transformer"].made_of)


def draw_offloaded(name: str, folder: Path, chosen: dict[str, int], fields: dict[str, Any]) -> tuple[Any, set[str]]:
    """Latents of the second request with `offload=text_encoder`, and where its weights are afterwards."""
    from hydrarun.pipeline.request import make_state

    runner = Runner(config(name, folder, chosen, "offload=text_encoder"))
    state = make_state({**runner.config["sampling"], **fields}, [])
    runner.draw(replace(state), Timings(CPU))
    latents = runner.draw(state, Timings(CPU)).latents.numpy()
    return latents, {tensor.device.type for tensor in runner.built.parts.pipeline.text_encoder.parameters()}
