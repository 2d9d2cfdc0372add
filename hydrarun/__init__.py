"""hydrarun: a declarative, Hydra-configured inference runner for diffusion transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hydrarun.runner import Runner

__version__ = "0.1.0"


def load(*overrides: str) -> Runner:
    """Compose, validate and build a run exactly as `python -m hydrarun OVERRIDES…` does, with its weights loaded.

    Raises `hydrarun.errors.UsageError` for what the command would refuse with exit code 2.
    """
    from hydrarun.compose import compose
    from hydrarun.runner import Runner

    return Runner(compose(overrides))
