"""A sweep before it runs: its settings, and its points in the order in which Hydra will take them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hydra import version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import setup_globals
from hydra.types import RunMode
from omegaconf import DictConfig

from hydrarun.cli.sweep import order
from hydrarun.config.compose import Origin, register, split
from hydrarun.config.hydra_errors import explained
from hydrarun.core import resources

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
        with explained(self.overrides):
            parsed = OverridesParser.create(config_loader=self.loader).parse_overrides(words)
            (points,) = BasicSweeper.split_arguments(parsed, None)
        return points

    def compose(self, point: Sequence[str]) -> tuple[dict[str, Any], Origin]:
        """The configuration of a point, unchecked. Raises UsageError."""
        with explained(point):
            composed = self.loader.load_sweep_config(self.shared, list(point))
            return split(composed, composed.hydra)


def read(overrides: Sequence[str], flags: Sequence[str]) -> Sweep:
    """The sweep of quoted overrides, in the order that loads least, and Hydra's flags. Raises UsageError."""
    version.setbase("1.3")
    setup_globals()
    register(overrides)
    with explained(overrides):
        words = order.ordered(overrides)
        loader = ConfigLoaderImpl(search_path(flags))
        shared = loader.load_configuration(named(flags, "--config-name", "-cn") or "config", words, RunMode.MULTIRUN)
        return Sweep(words, loader, shared)


def search_path(flags: Sequence[str]) -> Any:
    """Where Hydra will look for options."""
    path = create_config_search_path(named(flags, "--config-path", "-cp") or str(resources.folder("conf")))
    if folder := named(flags, "--config-dir", "-cd"):
        path.prepend("command-line", f"file://{os.path.abspath(folder)}", SearchPathQuery(provider="schema"))
    return path


def named(flags: Sequence[str], *names: str) -> str:
    """The value of a flag; "" without it."""
    for place, flag in enumerate(flags):
        name, equals, value = flag.partition("=")
        if name in names:
            return value if equals else flags[place + 1]
    return ""
