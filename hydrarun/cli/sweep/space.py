"""A sweep before it runs: its settings, and its points in the order in which Hydra will take them."""

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
    """What a command line with `-m` asks for."""

    #: quoted (`hydrarun.core.quoting.literal`), slow keys first
    overrides: list[str]
    loader: ConfigLoaderImpl
    #: what all points share
    shared: DictConfig

    @property
    def folder(self) -> Path:
        """Where the points' directories are, absolute."""
        return Path(self.shared.hydra.sweep.dir).absolute()

    def engine(self, kind: str) -> str:
        """The option of Hydra's `launcher` or `sweeper`."""
        return self.shared.hydra.runtime.choices[f"hydra/{kind}"]

    @cached_property
    def points(self) -> list[list[str]] | None:
        """The overrides of each point, in order; None: a sweeper other than Hydra's own decides while it runs.

        Raises UsageError for values that Hydra's own cannot sweep over.
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
        """The configuration of a point, unchecked. Raises UsageError."""
        with translate_errors(point):
            composed = self.loader.load_sweep_config(self.shared, list(point))
            return split_composed(composed, composed.hydra)


def read_sweep(overrides: Sequence[str], flags: Sequence[str]) -> Sweep:
    """The sweep of quoted overrides, in the order that loads least, and Hydra's flags. Raises UsageError."""
    with translate_errors(overrides):
        words = order.order_overrides(overrides)
    return Sweep(words, *load_configuration(words, flags, RunMode.MULTIRUN))
