"""Paths in the checkout."""

from __future__ import annotations

import os
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
#: files that older versions wrote
DATA = TESTS / "data"


def environment(**more: str) -> dict[str, str]:
    """Return the environment for a process that runs the code and test helpers of the checkout."""
    return {**os.environ, "PYTHONPATH": str(ROOT), **more}
