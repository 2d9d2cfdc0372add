"""The order of a sweep: what is built varies slowest, so that points that share a load come one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser

from hydrarun.engine.ranks.worker import BUILT_FROM

#: sections whose change loads anew; a recipe and a plan set any of them
SLOW = (*BUILT_FROM, "recipe", "plan")


def is_slow(override: str) -> bool:
    """Whether another value of this key is another build."""
    return parse_key(override).replace("/", ".").partition(".")[0] in SLOW


def parse_key(override: str) -> str:
    """`model.path` of `+model.path=here`."""
    return override.partition("=")[0].lstrip("+~")


def list_swept_keys(overrides: Sequence[str]) -> list[str]:
    """The keys that have several values, from the one that varies slowest. Raises what Hydra's parser raises."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    several = {one.get_key_element(): one.is_sweep_override() for one in parsed}  # in Hydra too, the last one counts
    return [name for name, many in several.items() if many]


def order_overrides(overrides: Sequence[str]) -> list[str]:
    """The overrides, slow keys first if that changes the order of the points, else as they are.

    What is set does not change: overrides of one key, and of the keys inside it, keep their order.
    """
    first = [*filter(is_slow, overrides), *(one for one in overrides if not is_slow(one))]
    return list(overrides) if list_swept_keys(first) == list_swept_keys(overrides) else first


def describe_reorder(before: Sequence[str], after: Sequence[str]) -> Iterator[str]:
    """What is said of a changed order."""
    if list(before) != list(after):
        slow = [name for name in list_swept_keys(after) if is_slow(name)]
        vary = "varies" if len(slow) == 1 else "vary"
        yield f"order: {', '.join(slow)} {vary} slowest, so that what is loaded serves the points that follow"
