"""Helpers for the tests of Cache-DiT, including the functions that run on ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hydrarun.config.checks.values import find_cfg_scale
from hydrarun.core.timing import Timings
from tests.helpers import parallel_runs, subjects


def node(**arguments):
    """Return the cache node of a configuration."""
    return {"_target_": "hydrarun.acceleration.cache.cache_dit.CacheDiT", **arguments}


def guided(subject, steps: int = 8) -> dict:
    """Return the fields of a request with both branches."""
    return {
        find_cfg_scale(subjects.CONFIGS[subject.name])[0]: 3.0,
        "negative_prompt": "x",
        "num_inference_steps": steps,
    }


def record(subject) -> dict:
    """Return the record of the last request's cache."""
    return subject.runner.built.parts.cache.record()


class Counter:
    """Counts the calls of each block, by expert."""

    def __init__(self, subject) -> None:
        self.calls: dict[str, list[int]] = {}
        self.handles = []
        for name, transformer in subject.runner.built.parts.experts.transformers.items():
            self.calls[name] = [0] * transformer.depth
            for index, block in enumerate(transformer.all_blocks()):
                self.handles.append(block.register_forward_hook(self.hook(name, index)))

    def hook(self, name, index):
        def count(*_):
            self.calls[name][index] += 1

        return count

    def __enter__(self) -> dict[str, list[int]]:
        return self.calls

    def __exit__(self, *_) -> None:
        for handle in self.handles:
            handle.remove()


def draw(
    name: str, folder: Path, chosen: dict[str, int], images: int, fields: dict[str, Any], node: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Draw; return the latents of this rank's pictures and the record of its cache."""
    from hydrarun.pipeline.request import make_state

    runner = parallel_runs.runner_for(name, folder, chosen)
    sampling = {**runner.config["sampling"], **fields}
    state = runner.draw(
        make_state(sampling, subjects.pictures(images, runner.config)), Timings(parallel_runs.CPU), node
    )
    return state.latents.numpy(), runner.built.parts.cache.record()


def distance(kept: torch.Tensor, now: torch.Tensor, cuts: list[int]) -> float:
    """Return the distance between `[B, S, D]` tensors whose tokens are sharded across ranks at `cuts`."""
    from hydrarun.acceleration.cache.cache_dit import DistributedCachedContext

    own = slice(*cuts[dist.get_rank() :][:2])
    return DistributedCachedContext([dist.group.WORLD]).distance(kept[:, own], now[:, own])
