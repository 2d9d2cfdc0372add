"""Fixtures of the tests that measure runs."""

from __future__ import annotations

import pytest

from hydrarun.engine.runs.single import run_single
from tests.helpers.measured import config


@pytest.fixture
def runner(tiny_runner, monkeypatch):
    """The shared runner, with a list `drawn` of the caches that it used."""
    drawn, draw = [], tiny_runner.draw

    def remember(state, timings, cache=None):
        drawn.append((cache or tiny_runner.config["cache"])["_target_"].rpartition(".")[2])
        return draw(state, timings, cache)

    monkeypatch.setattr(tiny_runner, "draw", remember)
    monkeypatch.setattr(tiny_runner, "drawn", drawn, raising=False)
    return tiny_runner


@pytest.fixture
def run(runner, tiny_folder, tmp_path):
    """Runs with the given overrides; returns the content of run.json."""

    def do(*overrides: str, name: str = "run") -> dict:
        return run_single(runner, config(tiny_folder, tmp_path / "twins", *overrides), tmp_path / name)

    return do
