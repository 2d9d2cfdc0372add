"""A sweep before it runs: its settings, and its points in the order in which Hydra runs them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig

from hydrarun.cli.sweep import order
from hydrarun.config.compose import ConfigOrigin, split_composed
from hydrarun.config.hydra_errors import translate_errors
from hydrarun.config.hydra_main import load_configuration

BASIC = "basic"


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

        Raises UsageError for values that Hydra's basic sweeper does not support.
        """
        if self.engine("sweeper") != BASIC:
            return None
        params = self.shared.hydra.sweeper.params or {}
        words = [*(f"{key}={value}" for key, value in params.items()), *self.shared.hydra.overrides.task]
        with translate_errors(self.overrides):
            parsed = OverridesParser.create(config_loader=self.loader).parse_overrides(words)
            (points,) = BasicSweeper.split_arguments(parsed, None)
        return points

    def compose(self, point: Sequence[str]) -> tuple[dict[str, Any], ConfigOrigin]:
        """Compose the configuration of a point, unchecked. Raises UsageError."""
        with translate_errors(point):
            composed = self.loader.load_sweep_config(self.shared, list(point))
            return split_composed(composed, composed.hydra)


def read_sweep(overrides: Sequence[str], flags: Sequence[str]) -> Sweep:
    """Read the sweep of quoted overrides and Hydra's flags, ordered for the fewest loads. Raises UsageError."""
    with translate_errors(overrides):
        words = order.order_overrides(overrides)
    return Sweep(words, *load_configuration(words, flags, RunMode.MULTIRUN))
