"""The order of a sweep: keys that need a new load vary slowest, so that points with the same load run in succession."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser

from hydrarun.engine.ranks.worker import BUILT_FROM

#: sections whose change needs a new load; a recipe or a plan can set any of them
SLOW = (*BUILT_FROM, "recipe", "plan")


def is_slow(override: str) -> bool:
    """Return whether another value of this key needs a new load."""
    return parse_key(override).replace("/", ".").partition(".")[0] in SLOW


def parse_key(override: str) -> str:
    """Return the key of an override: `model.path` for `+model.path=here`."""
    return override.partition("=")[0].lstrip("+~")


def list_swept_keys(overrides: Sequence[str]) -> list[str]:
    """Return the keys with several values, the slowest first. Raises the errors of Hydra's parser."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    several = {one.get_key_element(): one.is_sweep_override() for one in parsed}  # as in Hydra, the last one counts
    return [name for name, many in several.items() if many]


def order_overrides(overrides: Sequence[str]) -> list[str]:
    """Move slow keys to the front if that changes the order of the points; otherwise return the overrides unchanged.

    The result is the same configurations: overrides of a key and of its subkeys keep their order.
    """
    first = [*filter(is_slow, overrides), *(one for one in overrides if not is_slow(one))]
    return list(overrides) if list_swept_keys(first) == list_swept_keys(overrides) else first


def describe_reorder(before: Sequence[str], after: Sequence[str]) -> Iterator[str]:
    """Yield a note if the order has changed."""
    if list(before) != list(after):
        slow = [name for name in list_swept_keys(after) if is_slow(name)]
        vary = "varies" if len(slow) == 1 else "vary"
        yield f"order: {', '.join(slow)} {vary} slowest, so that consecutive points share a load"
