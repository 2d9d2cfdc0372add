"""`--dry-run`: lists the points in order, what each loads, and whether it fits, without running anything."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from hydrarun.cli.sweep import order
from hydrarun.cli.sweep.space import BASIC, read_sweep
from hydrarun.config.compose import ConfigOrigin, check_composed
from hydrarun.core.errors import UsageError
from hydrarun.core.printable import make_printable
from hydrarun.engine.plan.devices import format_gib
from hydrarun.engine.plan.fast_imports import skip_optional_imports
from hydrarun.engine.plan.planner import Plan, find_plan_device, make_plan
from hydrarun.engine.ranks import launch, worker

#: flags that a dry run accepts: -m, and those for the location of options
TAKEN = ("-m", "--multirun", "--config-dir", "-cd", "--config-path", "-cp", "--config-name", "-cn")

NO_PLAN = {"auto": False, "device": None}


class PlannedPoint(NamedTuple):
    """A point that is planned but does not run."""

    #: the overrides that differ between points
    overrides: list[str]
    #: the description of its load and `worker.build_key`; None if it is refused
    load: tuple[str, str] | None
    verdict: str
    good: bool


def list_points(overrides: list[str], flags: list[str]) -> int:
    """List the points of quoted overrides; return 0 if all of them are valid and fit, else 1. Raises UsageError."""
    if strange := [flag for flag in flags if flag.startswith("-") and flag.partition("=")[0] not in TAKEN]:
        raise UsageError(f"--dry-run cannot be combined with {strange[0]}: leave one of them out")
    sweep = read_sweep(overrides, flags)
    many = bool({"-m", "--multirun"} & set(flags))
    points = sweep.points if many else [list(sweep.shared.hydra.overrides.task)]
    if points is None:
        raise UsageError(
            f"--dry-run: hydra/sweeper={sweep.engine('sweeper')} chooses points during the run; they cannot be listed"
        )
    own = order.list_swept_keys(sweep.overrides)
    for note in order.describe_reorder(overrides, sweep.overrides) if many else ():
        print(note, file=sys.stderr)
    with skip_optional_imports():
        found = list(judge_points(((point, *sweep.compose(point)) for point in points), own if many else None))
    print("\n".join(format_points(found)))
    if many and sweep.engine("launcher") != BASIC:
        print(f"hydra/launcher={sweep.engine('launcher')}: each of its processes loads the weights separately")
    return int(not all(point.good for point in found))


def judge_points(
    points: Iterable[tuple[Sequence[str], dict[str, Any], ConfigOrigin]], own: Sequence[str] | None
) -> Iterator[PlannedPoint]:
    """Yield each point with its verdict. Equal plans are made once. `own`: the keys to show, or None for all."""
    plans: dict[str, Plan] = {}
    for overrides, config, origin in points:
        shown = [one for one in overrides if own is None or order.parse_key(one) in own]
        try:
            made = plan_point(config, origin, plans)
        except UsageError as error:
            yield PlannedPoint(shown, None, f"refused: {error}", False)
            continue
        instead = made.suggestions[0] if config["plan"]["auto"] and not made.fits and made.suggestions else None
        built = {**config, **(instead.changes if instead else {})}
        slow = [one for one in overrides if order.is_slow(one) and order.parse_key(one) != "model"]
        words = " ".join([f"model={config['model']['name']}", *slow])
        yield PlannedPoint(
            shown, (words, worker.build_key(built)), describe_fit(made), made.fits or instead is not None
        )


def plan_point(config: dict[str, Any], origin: ConfigOrigin, plans: dict[str, Plan]) -> Plan:
    """Return the plan of a point, from `plans` if a point that differs only by seeds has one.

    Raises the UsageError that a run on the planned device would raise.
    """
    asked = check_composed({**config, "device": find_plan_device(config).kind, "plan": NO_PLAN}, origin)
    if config["plan"]["device"] is None:  # else the ranks are those of another machine
        launch.check_rank_count(config)
    sampling = asked["sampling"]
    count = len(sampling["seed"]) if isinstance(sampling["seed"], list) else None
    key = json.dumps([config["plan"], {**asked, "sampling": {**sampling, "seed": count}}], sort_keys=True)
    if key not in plans:
        plans[key] = make_plan({**asked, "device": config["device"], "plan": config["plan"]}, origin)
    return plans[key]


def describe_fit(made: Plan) -> str:
    """Describe whether a point fits; if not, the missing memory and settings that fit."""
    assert made.asked is not None
    needs = f"{format_gib(made.asked.peak)} of {format_gib(made.device.memory)}"
    if made.fits:
        return f"fits: {needs}"
    over = made.asked.peak - made.device.memory
    by = f", {format_gib(over)} too much" if over > 0 else ""
    instead = " ".join(made.suggestions[0].overrides) if made.suggestions else ""
    return f"does NOT fit: {needs}{by}" + (f"; would with {instead}" if instead else "")


def format_points(points: Sequence[PlannedPoint]) -> Iterator[str]:
    """Format the list; points that share a load are listed below it."""
    texts = [make_printable(" ".join(point.overrides)) for point in points]
    width = max(map(len, texts))
    loads = 0
    before = None
    body = []
    for number, (point, text) in enumerate(zip(points, texts, strict=True)):
        if point.load and point.load != before:
            loads += 1
            before = point.load
            body.append(make_printable(f"load {loads}: {point.load[0]}"))
        margin = f"\n{' ' * (len(f'{number:4}') + width + 4)}"
        body.append(f"{number:4}  {text:{width}}  {margin.join(point.verdict.splitlines())}".rstrip())
    yield f"{format_count(len(points), 'point')}, {format_count(loads, 'load')}"
    yield from body


def format_count(count: int, thing: str) -> str:
    """Format a count: `1 point`, `2 points`…"""
    return f"{count} {thing}{'' if count == 1 else 's'}"
