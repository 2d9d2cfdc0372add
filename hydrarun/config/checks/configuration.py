"""All checks of a configuration by itself. Every run calls them, whatever the source of its configuration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hydrarun.config import targets
from hydrarun.config.checks import compatibility
from hydrarun.config.checks.values import check_values

Origin = Callable[[str], str]


def check_configuration(config: dict[str, Any], origin: Origin | None = None) -> None:
    """Check for classes that are not allowed, invalid values, and incompatible settings.

    Reads no checkpoint and no input images. `origin` returns where the value of a key came from. Raises UsageError.
    """
    check_sections(config, origin)
    compatibility.check_compatibility(config)


def check_sections(config: dict[str, Any], origin: Origin | None = None) -> None:
    """Check classes and values, but not compatibility: a plan lists incompatible settings itself."""
    targets.check_targets(config, origin)
    check_values(config, origin)
