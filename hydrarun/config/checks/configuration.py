"""All that a configuration by itself must satisfy, whoever it comes from: the one door that every run goes through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hydrarun.config import targets
from hydrarun.config.checks import compatibility
from hydrarun.config.checks.values import check_values

Origin = Callable[[str], str]


def check_configuration(config: dict[str, Any], origin: Origin | None = None) -> None:
    """Refuse classes that are not allowed, values that cannot be, and settings that do not go together.

    Reads no files but those that it names as missing. `origin` tells where the value of a key came from. Raises
    UsageError.
    """
    check_sections(config, origin)
    compatibility.check_compatibility(config)


def check_sections(config: dict[str, Any], origin: Origin | None = None) -> None:
    """The same without what does not go together, for a plan, which lists that."""
    targets.check_targets(config, origin)
    check_values(config, origin)
