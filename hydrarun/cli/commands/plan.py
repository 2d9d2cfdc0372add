"""`hydrarun plan`: what a run needs, whether it fits, and the cheapest settings that fit. Reads no weights."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

from hydrarun.cli.arguments import Arguments
from hydrarun.config.compose import compose_unchecked
from hydrarun.config.schema import MISSING
from hydrarun.core.errors import UsageError
from hydrarun.core.printable import make_printable
from hydrarun.core.quoting import quote_overrides
from hydrarun.engine.plan.devices import format_gib
from hydrarun.engine.plan.fast_imports import skip_optional_imports
from hydrarun.engine.plan.planner import Plan, make_plan, plan_to_json

USAGE = """\
usage: hydrarun plan [KEY=VALUE ...] [plan.device=h100] [--json]

Shows what a run with these settings needs on each rank and in each phase: bytes of weights, activations and cache,
operations, bytes sent to other ranks, and seconds at the peak rates of the device; whether it fits; and the three
cheapest settings that fit, as overrides to paste. It reads only configs, or published shapes if the model is not
downloaded, and needs no GPU. plan.device names a GPU; the default is the device of this machine.
Exit code: 0 the run fits, 1 it does not fit, 2 the settings cannot be combined."""


#: the prompt to plan with if none is given; only its length matters
PROMPT = "a photograph of an old lighthouse on a rocky coast at dusk, waves below it, warm light in its windows"


def show_plan(line: Arguments) -> int:
    """Print the plan of the given settings; return the exit code. Raises UsageError."""
    config, origin = compose_unchecked(quote_overrides(line.words))
    if config["plan"]["auto"]:
        raise UsageError("plan=auto is for a run, which then takes the first suggestion; `hydrarun plan` shows all")
    with skip_optional_imports():
        made = make_plan(fill_prompt(config), origin)
    if "--json" in line.flags:
        json.dump(plan_to_json(made), sys.stdout, indent=2)
        print()
    else:
        print("\n".join(map(make_printable, format_plan(made))))
    return 2 if made.conflicts else 0 if made.fits else 1


def fill_prompt(config: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration with a prompt of usual length if it has none."""
    if config["sampling"]["prompt"] != MISSING:
        return config
    return {**config, "sampling": {**config["sampling"], "prompt": PROMPT}}


def format_plan(made: Plan) -> Iterator[str]:
    """Format the plan as text lines."""
    if made.conflicts:
        yield from made.conflicts
        return
    assert made.asked is not None
    yield f"{made.model} on {made.device.name} ({format_gib(made.device.memory)} for a run); {made.source}"
    yield ", ".join(f"{name} {format_gib(size)}" for name, size in made.components.items())
    if made.ranks > 1:
        yield f"rank 0 of {made.ranks}:"
    yield from format_phases(made)
    yield describe_fit(made)
    if made.suggestions:
        yield "the cheapest settings that fit:"
        for one in made.suggestions:
            words = " ".join(one.overrides) or "(as it is)"
            said = "" if one.lossless else ", changes results"
            yield f"  {words:44} {format_gib(one.peak)}{format_duration(one.seconds, ', ')}{said}"
    elif not made.fits:
        yield "no setting of offload, quantization and vae.tiling fits: try a smaller size, more ranks, another device"


def format_phases(made: Plan) -> Iterator[str]:
    """Format the phases as a table."""
    assert made.asked is not None
    header = ("phase", "weights", "activations", "of them cache", "together", "TFLOP", "sent", "at least")
    rows = [
        (
            phase.name,
            format_gib(phase.weights),
            format_gib(phase.activations),
            format_gib(phase.cache),
            format_gib(phase.peak),
            f"{phase.flops / 1e12:,.1f}",
            format_gib(phase.sent),
            format_duration(phase.seconds) or "?",
        )
        for phase in made.asked.phases
    ]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        yield "  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))


def describe_fit(made: Plan) -> str:
    """Describe in one sentence whether the run fits."""
    assert made.asked is not None
    host = f", and {format_gib(made.asked.host)} on the host" if made.asked.host else ""
    steps = made.asked.phases[1]
    each = f"; a step {steps.flops / made.steps / 1e12:,.1f} TFLOP, {format_gib(steps.sent / made.steps)} sent"
    fits = "fits" if made.fits else "does NOT fit"
    return f"{fits}: {format_gib(made.asked.peak)} of {format_gib(made.device.memory)}{host}{each}"


def format_duration(seconds: float | None, before: str = "") -> str:
    """Format seconds after the text `before`; empty if they are unknown."""
    return "" if seconds is None else f"{before}{seconds:,.2f} s"
