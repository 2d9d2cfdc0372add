"""Helpers for tests of files with an embedded recipe."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hydrarun.core.errors import UsageError

NASTY = 'a "cat", [sitting] = #1, ${x} \\ \n一只猫 🐈 ünï'


def refusal(read: Callable[[Path], Any], path: Path) -> str:
    """Return the one-line message with which `read` refuses a file, without the leading path."""
    with pytest.raises(UsageError) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")
