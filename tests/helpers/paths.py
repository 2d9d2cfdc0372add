"""Where things lie in the checkout."""

from __future__ import annotations

import os
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
#: files that older versions wrote
DATA = TESTS / "data"


def environment(**more: str) -> dict[str, str]:
    """That of a process which runs the checkout's code, and helpers of its tests."""
    return {**os.environ, "PYTHONPATH": str(ROOT), **more}
