"""A sweep before it runs: its settings, and its points in the order in which Hydra runs them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, Override, RangeSweep
from hydra.types import RunMode
from omegaconf import DictConfig

from hydrarun.cli.sweep import order
from hydrarun.config.bounds import MAX_POINTS
from hydrarun.config.compose import ConfigOrigin, split_composed
from hydrarun.config.hydra_errors import translate_errors
from hydrarun.config.hydra_main import load_configuration
from hydrarun.core.errors import UsageError

BASIC = "basic"

#: a file may name the points of a sweep, but not lift the limit on ranks for them
SWEPT, LIMIT = "hydra.sweeper.params", "parallel.max_ranks"


@dataclass
class Sweep:
    """The sweep of a command line with `-m`."""

    #: quoted (`hydrarun.core.quoting.quote_overrides`), slow keys first
    overrides: list[str]
    loader: ConfigLoaderImpl
    #: the configuration that all points share
    shared: DictConfig

    @property
    def folder(self) -> Path:
        """The absolute folder that holds the folders of the points."""
        return Path(self.shared.hydra.sweep.dir).absolute()

    def engine(self, kind: str) -> str:
        """Return the chosen option of Hydra's group `kind`: `launcher` or `sweeper`."""
        return self.shared.hydra.runtime.choices[f"hydra/{kind}"]

    @cached_property
    def points(self) -> list[list[str]] | None:
        """The overrides of each point, in order; None for other sweepers, which choose points while they run.

        Raises UsageError for too many points, and for values that Hydra's basic sweeper does not support.
        """
        if self.engine("sweeper") != BASIC:
            return None
        params = self.shared.hydra.sweeper.params or {}
        if LIMIT in params and f"{SWEPT}.{LIMIT}" not in (order.parse_key(one) for one in self.overrides):
            raise UsageError(f"{SWEPT}.{LIMIT}: set in the file of an option; only the command line may set it")
        words = [*(f"{key}={value}" for key, value in params.items()), *self.shared.hydra.overrides.task]
        with translate_errors(self.overrides):
            parsed = OverridesParser.create(config_loader=self.loader).parse_overrides(words)
            check_point_count(parsed)
            (points,) = BasicSweeper.split_arguments(parsed, None)
        return points

    def compose(self, point: Sequence[str]) -> tuple[dict[str, Any], ConfigOrigin]:
        """Compose the configuration of a point, unchecked. Raises UsageError."""
        with translate_errors(point):
            composed = self.loader.load_sweep_config(self.shared, list(point))
            return split_composed(composed, composed.hydra)


def check_point_count(parsed: Sequence[Override]) -> None:
    """Raise UsageError for no points, or more than `MAX_POINTS`, before Hydra lists them."""
    counts = [(one.get_key_element(), count_values(one)) for one in parsed]
    if empty := [key for key, count in counts if count == 0]:
        raise UsageError(f"{empty[0]}: a sweep over no values")
    # Hydra lists the values of every override, although of several for one key only the last counts
    if math.prod(dict(counts).values()) > MAX_POINTS or any(count > MAX_POINTS for _, count in counts):
        values = ((key, count if count <= MAX_POINTS else f"over {MAX_POINTS}") for key, count in counts)
        many = ", ".join(f"{key} has {count} values" for key, count in values if count != 1)
        raise UsageError(f"-m: more than {MAX_POINTS} points: {many}. Sweep fewer, or draw input.prompts=FILE")


def count_values(override: Override) -> int:
    """Return the number of values that an override sweeps over; at most `MAX_POINTS` + 1 for a range."""
    value = override.value()
    if isinstance(value, ChoiceSweep):
        return len(value.list)
    if isinstance(value, RangeSweep):
        try:
            return sum(1 for _ in islice(value.range(), MAX_POINTS + 1))
        except (ArithmeticError, ValueError):  # nan, or a step of 0
            raise UsageError(f"{override.input_line}: not a range of numbers") from None
    if isinstance(value, Glob):
        return sum(1 for _ in override.sweep_iterator())
    return 1


def read_sweep(overrides: Sequence[str], flags: Sequence[str]) -> Sweep:
    """Read the sweep of quoted overrides and Hydra's flags, ordered for the fewest loads. Raises UsageError."""
    with translate_errors(overrides):
        words = order.order_overrides(overrides)
    return Sweep(words, *load_configuration(words, flags, RunMode.MULTIRUN))
