"""Shared code of the benches: alternating measurements, medians, a description of the machine, tables in a page."""

from __future__ import annotations

import inspect
import itertools
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hydrarun.core.device import synchronize
from hydrarun.core.errors import RunError, UsageError
from hydrarun.core.files import write_atomically
from hydrarun.outputs.provenance import collect_versions, describe_hardware
from hydrarun.pipeline.request import PLAIN
from hydrarun.pipeline.state import State


class Drawn(NamedTuple):
    """Seconds of each step of a denoising loop, and its final latents."""

    steps: list[float]
    latents: Tensor


def theirs(pipeline: Any, transformer: Any, given: Mapping[str, Any], device: torch.device) -> Drawn:
    """Run diffusers' loop, synchronizing after each step like ours. `given`: arguments of the pipeline's call."""
    moments: list[float] = []

    def note(*_: Any) -> None:
        synchronize(device)
        moments.append(time.perf_counter())

    def before(*_: Any) -> None:
        if not moments:  # the first call starts the first step
            note()

    def after(pipe: object, step: int, timestep: object, tensors: dict) -> dict:
        note()
        return tensors

    hook = transformer.register_forward_pre_hook(before)
    try:
        latents = pipeline(**given, callback_on_step_end=after, output_type="latent")[0]
    finally:
        hook.remove()
    return Drawn([end - start for start, end in itertools.pairwise(moments)], latents)


def asked(pipeline: Any, state: State, **texts: Any) -> dict[str, Any]:
    """Return a request as arguments that diffusers' call accepts, with the same initial noise."""
    accepted = inspect.signature(pipeline.__call__).parameters
    given = {name: getattr(state, name) for name in PLAIN} | texts
    generators = [torch.Generator().manual_seed(seed) for seed in state.seeds]
    kept = {name: value for name, value in given.items() if name in accepted and value is not None}
    return kept | {"generator": generators}


def in_turns(
    loops: Mapping[str, Callable[[], Drawn]], rounds: int, say: Callable[[str], None] = print
) -> tuple[dict[str, list[Drawn]], dict[str, str]]:
    """Run each loop once per round (A B A B), after a warm-up round. Return results, and errors of failed loops."""
    results: dict[str, list[Drawn]] = {}
    reasons: dict[str, str] = {}
    for name, loop in loops.items():
        start = time.perf_counter()
        try:
            loop()
            results[name] = []
            say(f"warmed up: {name}, {time.perf_counter() - start:.1f} s")
        except (UsageError, RunError, RuntimeError) as error:  # RuntimeError is torch's: out of memory, compiler errors
            reasons[name] = first_line(error)
            say(f"cannot run: {name}: {reasons[name]}")
    for _ in range(rounds):
        for name, drawn in results.items():
            drawn.append(loops[name]())
    return results, reasons


def first_line(error: Exception) -> str:
    """Return the first line of an error message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def missing(reasons: Mapping[str, str]) -> str:
    """Return a sentence for each row that could not run."""
    return " ".join(f"`{name}` could not run: {reason.rstrip('.')}." for name, reason in reasons.items())


def ratio(ours: Sequence[float], others: Sequence[float]) -> float:
    """Return the median of the per-round ratios, so that measurements close in time are compared."""
    return statistics.median(a / b for a, b in zip(ours, others, strict=True))


def difference(ours: Sequence[Drawn], others: Sequence[Drawn]) -> float:
    """Return the largest difference between final latents, over all rounds."""
    return max((a.latents - b.latents).abs().max().item() for a, b in zip(ours, others, strict=True))


def machine(device: torch.device) -> str:
    """Describe the machine, the versions, the date and the load of the last minute."""
    facts, known = describe_hardware(str(device)), collect_versions()
    name = facts["gpu"] if "gpu" in facts else f"{facts['cpu']}, {facts['torch_threads']} threads"
    libraries = ", ".join(f"{library} {known[library]}" for library in ("torch", "diffusers"))
    return f"{name}; {libraries}; {date.today()}; load {os.getloadavg()[0]:.1f}"


def keep(page: Path, mark: str, text: str) -> None:
    """Write the text between the marks `<!-- MARK -->` and `<!-- end -->` of a page."""
    before, found, rest = page.read_text(encoding="utf-8").partition(f"<!-- {mark} -->\n")
    _, end, after = rest.partition("<!-- end -->\n")
    if not found or not end:
        raise SystemExit(f"{page}: has no <!-- {mark} --> with an <!-- end --> after it")
    write_atomically(page, f"{before}{found}{text}\n\n{end}{after}".encode())
