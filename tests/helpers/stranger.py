"""What tests of files with a recipe inside have in common."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hydrarun.core.errors import UsageError

NASTY = 'a "cat", [sitting] = #1, ${x} \\ \n一只猫 🐈 ünï'


def refusal(read: Callable[[Path], Any], path: Path) -> str:
    """Why `read` refuses a file: its one line, without the path in front."""
    with pytest.raises(UsageError) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")
