"""`hydrarun plan`: what a run would take, whether it fits, and the cheapest settings that do. No weights are read."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from hydrarun.config.compose import compose_raw
from hydrarun.config.schema import MISSING
from hydrarun.core.errors import UsageError
from hydrarun.core.quoting import literal
from hydrarun.engine.plan.devices import gib
from hydrarun.engine.plan.planner import Plan, make

USAGE = """\
usage: hydrarun plan [KEY=VALUE ...] [plan.device=h100] [--json]

Says what the run of these settings would take, on each rank and in each phase: bytes of weights, activations and cache,
operations, bytes to other ranks, and seconds at the device's rates with nothing lost between; whether it fits; and the
three cheapest settings that fit, as overrides to paste. It reads configs, no weights, and needs no GPU: where the model
has not been downloaded, its published shapes. plan.device names a GPU; without it this machine's is taken.
The exit code is 0 if the run fits, 1 if it does not, 2 for settings that do not go together."""

#: optional packages of the libraries
NEVER_CALLED = ("torchao", "scipy")

#: what is drawn where no prompt is given: its length is what counts
PROMPT = "a photograph of an old lighthouse on a rocky coast at dusk, waves below it, warm light in its windows"


def main(argv: Sequence[str]) -> int:
    """Plan as `argv` says; the exit code. Raises UsageError."""
    flags = [word for word in argv if word.startswith("-")]
    if {"-h", "--help"} & set(flags):
        print(USAGE)
        return 0
    if unknown := [flag for flag in flags if flag != "--json"]:
        raise UsageError(f"plan: {unknown[0]}: no such flag; it takes --json")
    overrides = [word for word in argv if not word.startswith("-")]
    if strays := [word for word in overrides if "=" not in word and not word.startswith("~")]:
        raise UsageError(f"plan: {strays[0]}: neither key=value nor a flag")
    config, origin = compose_raw(literal(overrides))
    if config["plan"]["auto"]:
        raise UsageError("plan=auto is for a run, which then takes the first suggestion; `hydrarun plan` shows all")
    with hurried():
        made = make(with_prompt(config), origin)
    if "--json" in flags:
        json.dump(as_json(made), sys.stdout, indent=2)
        print()
    else:
        print("\n".join(lines(made)))
    return 2 if made.conflicts else 0 if made.fits else 1


@contextmanager
def hurried() -> Iterator[None]:
    """What the libraries import takes most of a plan's time: less of it.

    Packages that they import if they can, and a plan never calls, count as not installed, and nobody looks for garbage.
    """
    hidden = [name for name in NEVER_CALLED if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    except ImportError as error:
        raise UsageError(
            f"plan: {error} A plan does without {' and '.join(hidden)}, which this seems to need"
        ) from None
    finally:
        if collects:
            gc.enable()
        for name in hidden:
            del sys.modules[name]


def with_prompt(config: dict[str, Any]) -> dict[str, Any]:
    """The same with a prompt of usual length, if there is none."""
    if config["sampling"]["prompt"] != MISSING:
        return config
    return {**config, "sampling": {**config["sampling"], "prompt": PROMPT}}


def as_json(made: Plan) -> dict[str, Any]:
    """The plan for programs; docs/plan.md says what the keys mean."""
    return {
        "model": made.model,
        "device": {"name": made.device.name, "memory_bytes": made.device.memory},
        "source": made.source,
        "ranks": made.ranks,
        "fits": made.fits,
        "conflicts": made.conflicts,
        "peak_bytes": made.asked.peak if made.asked else None,
        "host_bytes": made.asked.host if made.asked else None,
        "seconds": made.asked.seconds if made.asked else None,
        "phases": [
            {
                "phase": phase.name,
                "weights_bytes": phase.weights,
                "activations_bytes": phase.activations,
                "cache_bytes": phase.cache,
                "peak_bytes": phase.peak,
                "flops": phase.flops,
                "sent_bytes": phase.sent,
                "seconds": phase.seconds,
            }
            for phase in (made.asked.phases if made.asked else [])
        ],
        "steps": made.steps,
        "components": made.components,
        "suggestions": [
            {
                "overrides": list(one.overrides),
                "lossless": one.lossless,
                "peak_bytes": one.peak,
                "seconds": one.seconds,
            }
            for one in made.suggestions
        ],
    }


def lines(made: Plan) -> Iterator[str]:
    """The plan for people."""
    if made.conflicts:
        yield from made.conflicts
        return
    assert made.asked is not None
    yield f"{made.model} on {made.device.name} ({gib(made.device.memory)} for a run); {made.source}"
    yield ", ".join(f"{name} {gib(size)}" for name, size in made.components.items())
    if made.ranks > 1:
        yield f"rank 0 of {made.ranks}:"
    yield from table(made)
    yield verdict(made)
    if made.suggestions:
        yield "the cheapest settings that fit:"
        for one in made.suggestions:
            words = " ".join(one.overrides) or "(as it is)"
            said = "" if one.lossless else ", other numbers"
            yield f"  {words:44} {gib(one.peak)}{duration(one.seconds, ', ')}{said}"
    elif not made.fits:
        yield "no setting of offload, quantization and vae.tiling fits: a smaller size, more ranks, or another device"


def table(made: Plan) -> Iterator[str]:
    """Phases in columns."""
    assert made.asked is not None
    header = ("phase", "weights", "activations", "of them cache", "together", "TFLOP", "sent", "at least")
    rows = [
        (
            phase.name,
            gib(phase.weights),
            gib(phase.activations),
            gib(phase.cache),
            gib(phase.peak),
            f"{phase.flops / 1e12:,.1f}",
            gib(phase.sent),
            duration(phase.seconds) or "?",
        )
        for phase in made.asked.phases
    ]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        yield "  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))


def verdict(made: Plan) -> str:
    """Whether it fits, in a sentence."""
    assert made.asked is not None
    host = f", and {gib(made.asked.host)} on the host" if made.asked.host else ""
    steps = made.asked.phases[1]
    each = f"; a step {steps.flops / made.steps / 1e12:,.1f} TFLOP, {gib(steps.sent / made.steps)} sent"
    fits = "fits" if made.fits else "does NOT fit"
    return f"{fits}: {gib(made.asked.peak)} of {gib(made.device.memory)}{host}{each}"


def duration(seconds: float | None, before: str = "") -> str:
    """Seconds for people; nothing if they are not known."""
    return "" if seconds is None else f"{before}{seconds:,.2f} s"
