"""What the benches share: loops that are measured in turns, medians, the machine's name, tables in a page."""

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
    """Seconds of each step of a denoising loop, and the latents that it ends with."""

    steps: list[float]
    latents: Tensor


def theirs(pipeline: Any, transformer: Any, given: Mapping[str, Any], device: torch.device) -> Drawn:
    """diffusers' own loop, each step synchronised as ours are. `given`: arguments of the pipeline's call."""
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
    """A request as diffusers' call takes it, with the noise that ours starts from; what it lacks is left out."""
    accepted = inspect.signature(pipeline.__call__).parameters
    given = {name: getattr(state, name) for name in PLAIN} | texts
    generators = [torch.Generator().manual_seed(seed) for seed in state.seeds]
    kept = {name: value for name, value in given.items() if name in accepted and value is not None}
    return kept | {"generator": generators}


def in_turns(
    loops: Mapping[str, Callable[[], Drawn]], rounds: int, say: Callable[[str], None] = print
) -> tuple[dict[str, list[Drawn]], dict[str, str]]:
    """Each loop once in every round, A B A B, after a round that warms them up; and why a loop cannot run, by name."""
    results: dict[str, list[Drawn]] = {}
    reasons: dict[str, str] = {}
    for name, loop in loops.items():
        start = time.perf_counter()
        try:
            loop()
            results[name] = []
            say(f"warmed up: {name}, {time.perf_counter() - start:.1f} s")
        except (UsageError, RunError, RuntimeError) as error:  # the last are torch's: out of memory, compilers
            reasons[name] = first_line(error)
            say(f"cannot run: {name}: {reasons[name]}")
    for _ in range(rounds):
        for name, drawn in results.items():
            drawn.append(loops[name]())
    return results, reasons


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def missing(reasons: Mapping[str, str]) -> str:
    """Why rows are not in a table, in sentences."""
    return " ".join(f"`{name}` could not run: {reason.rstrip('.')}." for name, reason in reasons.items())


def ratio(ours: Sequence[float], others: Sequence[float]) -> float:
    """The median of what the rounds give: neighbours in time are compared."""
    return statistics.median(a / b for a, b in zip(ours, others, strict=True))


def difference(ours: Sequence[Drawn], others: Sequence[Drawn]) -> float:
    """The largest difference between final latents, over all rounds."""
    return max((a.latents - b.latents).abs().max().item() for a, b in zip(ours, others, strict=True))


def machine(device: torch.device) -> str:
    """Where and when something is measured, and with what; the load is that of the last minute."""
    facts, known = describe_hardware(str(device)), collect_versions()
    name = facts["gpu"] if "gpu" in facts else f"{facts['cpu']}, {facts['torch_threads']} threads"
    libraries = ", ".join(f"{library} {known[library]}" for library in ("torch", "diffusers"))
    return f"{name}; {libraries}; {date.today()}; load {os.getloadavg()[0]:.1f}"


def keep(page: Path, mark: str, text: str) -> None:
    """Put the text between the page's marks `<!-- MARK -->` and `<!-- end -->`."""
    before, found, rest = page.read_text(encoding="utf-8").partition(f"<!-- {mark} -->\n")
    _, end, after = rest.partition("<!-- end -->\n")
    if not found or not end:
        raise SystemExit(f"{page}: has no <!-- {mark} --> with an <!-- end --> after it")
    write_atomically(page, f"{before}{found}{text}\n\n{end}{after}".encode())
