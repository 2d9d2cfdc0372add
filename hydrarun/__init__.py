"""hydrarun: a declarative, Hydra-configured inference runner for diffusion transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hydrarun.core.errors import RunError, UsageError
from hydrarun.core.version import __version__

if TYPE_CHECKING:
    from hydrarun.engine.ranks.launch import RemoteRunner
    from hydrarun.engine.runner import Runner

__all__ = ["RunError", "UsageError", "__version__", "load"]


def load(*overrides: str) -> Runner | RemoteRunner:
    """Compose, validate and build a run exactly as `python -m hydrarun OVERRIDES…` does, with its weights loaded.

    With `parallel=…` the ranks are started for it, until its `close()`; under torchrun every rank calls this and
    `generate` alike. Raises `hydrarun.UsageError` for what the command would refuse with exit code 2.
    """
    from hydrarun.config.compose import compose_config
    from hydrarun.engine.ranks import launch

    return launch.load_runner(compose_config(overrides))
