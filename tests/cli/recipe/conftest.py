"""Provides a finished run for the tests of recipes."""

from __future__ import annotations

from pathlib import Path

import pytest

from hydrarun.config.compose import compose_config
from tests.helpers.undrawn import draw


@pytest.fixture
def run_dir(tmp_path, monkeypatch) -> Path:
    """A finished run of the demo model, in the current folder."""
    monkeypatch.chdir(tmp_path)
    draw(compose_config(["sampling.num_inference_steps=8", "cache=mask", "cache.gate.density=fast"]), tmp_path / "run")
    return Path("run")
