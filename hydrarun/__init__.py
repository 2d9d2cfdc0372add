"""hydrarun: a declarative, Hydra-configured inference runner for diffusion transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hydrarun.launch import Remote
    from hydrarun.runner import Runner

__version__ = "0.1.0"


def load(*overrides: str) -> Runner | Remote:
    """Compose, validate and build a run exactly as `python -m hydrarun OVERRIDES…` does, with its weights loaded.

    With `parallel=…` the ranks are started for it, until its `close()`; under torchrun every rank calls this and
    `generate` alike. Raises `hydrarun.errors.UsageError` for what the command would refuse with exit code 2.
    """
    from hydrarun import launch
    from hydrarun.compose import compose

    return launch.load(compose(overrides))
