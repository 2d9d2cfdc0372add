"""Functions for the ranks of a test: they build a model option once and draw in different layouts."""

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
from hydrarun.engine.build import shard_by_mesh
from hydrarun.engine.runner import Runner
from tests.helpers import subjects

CPU = torch.device("cpu")
#: degrees that shard tokens, branches and pictures; the other degrees change the loaded weights
LIGHT = ("data_degree", "cfg_degree", "ring_degree", "ulysses_degree")


def degrees(**chosen: int) -> dict[str, int]:
    return {**vars(Parallel()), **chosen}


def config(name: str, folder: Path, chosen: dict[str, int], *more: str) -> dict[str, Any]:
    return {**composed(name, folder, *more), "parallel": degrees(**chosen)}


@cache
def composed(name: str, folder: Path, *more: str) -> dict[str, Any]:
    """Compose the configuration of a small run in one process."""
    from hydrarun.config.compose import compose_config

    return compose_config([*subjects.command(name, folder), *more])


#: results of VAE encoding in this process, by model
encoded: dict[str, dict[bytes, Any]] = defaultdict(dict)


def built(name: str, folder: Path, chosen: dict[str, int]) -> Runner:
    """Build a new runner. VAE encoding is cached across runners, unless ranks do it together."""
    runner = Runner(config(name, folder, chosen))
    if chosen.get("vae_degree", 1) == 1:
        vae = runner.built.parts.pipeline.vae
        vae.encode = subjects.remembering(vae.encode, encoded[name])
    return runner


@cache
def plain(name: str, folder: Path) -> Runner:
    """Build a runner without parallelism."""
    return built(name, folder, {})


def runner_for(name: str, folder: Path, chosen: dict[str, int]) -> Runner:
    """Return the runner for this layout; layouts that shard only tokens, branches or pictures share the weights."""
    if set(chosen) - set(LIGHT):
        return built(name, folder, chosen)
    runner = plain(name, folder)
    mesh = Mesh(degrees(**chosen), CPU)
    runner.built.parts.mesh = mesh
    for transformer in runner.built.parts.experts:
        transformer.shard_tokens(None)
        shard_by_mesh(transformer, mesh)
    return runner


def draw(name: str, folder: Path, chosen: dict[str, int], images: int, fields: dict[str, Any]) -> tuple[Any, Any, dict]:
    """Draw; return the frames of all pictures, the latents of this rank's pictures, and the bytes sent."""
    from hydrarun.pipeline.request import make_state

    runner = runner_for(name, folder, chosen)
    collectives.sent_bytes.clear()
    sampling = {**runner.config["sampling"], **fields}
    state = runner.draw(make_state(sampling, subjects.pictures(images, runner.config)), Timings(CPU))
    return state.frames, state.latents.numpy(), dict(collectives.sent_bytes)


def text_of_first() -> str:
    """Return the text that every rank receives from rank 0."""
    import torch.distributed as dist

    return collectives.broadcast_text("" if dist.get_rank() else "a cat, 一只猫", CPU)


def draw_cached(
    name: str, folder: Path, chosen: dict[str, int], cache_node: dict[str, Any], images: int, fields: dict[str, Any]
) -> tuple[Any, dict[str, Any], int]:
    """Draw with a cache; return the latents of this rank's pictures, the cache record, and the all-reduced bytes."""
    from hydrarun.pipeline.request import make_state

    runner = runner_for(name, folder, chosen)
    collectives.sent_bytes.clear()
    state = make_state({**runner.config["sampling"], **fields}, subjects.pictures(images, runner.config))
    latents = runner.draw(state, Timings(CPU), cache_node).latents.numpy()
    return latents, runner.built.parts.cache.record(), collectives.sent_bytes["all_reduce"]


def draw_with(name: str, folder: Path, chosen: dict[str, int], fields: dict[str, Any], *more: str) -> Any:
    """Return the latents of a run with further overrides."""
    from hydrarun.pipeline.request import make_state

    runner = Runner(config(name, folder, chosen, *more))
    state = make_state({**runner.config["sampling"], **fields}, [])
    return runner.draw(state, Timings(CPU)).latents.numpy()


def draw_compiled(name: str, folder: Path, chosen: dict[str, int], images: int, fields: dict[str, Any]) -> Any:
    """Return the latents with every block traced; graphs break at collectives."""
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
    """Draw with modulation tables; return the latents of this rank's pictures and the number of table rows."""
    from hydrarun.pipeline.request import make_state

    offload = {"_target_": "hydrarun.acceleration.offload.modulation_tables.ModulationOffload"}
    runner = Runner({**config(name, folder, chosen), "offload": offload})
    state = make_state({**runner.config["sampling"], **fields}, subjects.pictures(images, runner.config))
    latents = runner.draw(state, Timings(CPU)).latents.numpy()
    return latents, len(runner.built.parts.tables["transformer"].made_of)


def draw_offloaded(name: str, folder: Path, chosen: dict[str, int], fields: dict[str, Any]) -> tuple[Any, set[str]]:
    """Return the latents of the second request with `offload=text_encoder`, and where its weights are afterwards."""
    from hydrarun.pipeline.request import make_state

    runner = Runner(config(name, folder, chosen, "offload=text_encoder"))
    state = make_state({**runner.config["sampling"], **fields}, [])
    runner.draw(replace(state), Timings(CPU))
    latents = runner.draw(state, Timings(CPU)).latents.numpy()
    return latents, {tensor.device.type for tensor in runner.built.parts.pipeline.text_encoder.parameters()}


def list_cuts(name: str, folder: Path, chosen: dict[str, int], fields: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """Return what is recorded of each picture's cut prompts."""
    from hydrarun.engine.runner import make_pictures
    from hydrarun.pipeline.request import make_state

    runner = runner_for(name, folder, chosen)
    state = runner.draw(make_state({**runner.config["sampling"], **fields}, []), Timings(CPU))
    return [picture.cuts for picture in make_pictures(state)]
