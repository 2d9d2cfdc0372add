"""hydrarun: a declarative, Hydra-configured inference runner for diffusion transformers."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from hydrarun.core.errors import RunError, UsageError
from hydrarun.core.version import __version__

if TYPE_CHECKING:
    from hydrarun.engine.ranks.launch import RemoteRunner
    from hydrarun.engine.runner import Runner

__all__ = ["RunError", "UsageError", "__version__", "load"]


def load(*overrides: str) -> Runner | RemoteRunner:
    """Compose, validate and build a run exactly as `python -m hydrarun OVERRIDES…` does, and load its weights.

    With `parallel=…` this starts the ranks, which run until `close()`. Under torchrun every rank must call `load` and
    `generate`. Raises `hydrarun.UsageError` where the command would exit with code 2.
    """
    from hydrarun.config.compose import check_composed, compose_unchecked
    from hydrarun.core.quoting import quote_overrides
    from hydrarun.engine.ranks import launch

    composed, origin = compose_unchecked(quote_overrides(overrides))
    config = check_composed(composed, origin)
    for note in origin.notes(config):
        warnings.warn(note, stacklevel=2)
    return launch.load_runner(config)
