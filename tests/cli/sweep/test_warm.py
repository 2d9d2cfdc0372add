"""Sweeps with the real runner: points with the same load share it, in this process and on ranks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hydrarun.cli import main
from hydrarun.engine.runner import Runner
from tests.helpers.paths import environment

SMALL = ["device=cpu", "sampling.height=64", "sampling.width=64"]
SEEDS = "sampling.seed=1,2"


def records(folder: Path) -> list[dict]:
    """Return the run.json of each point, in order."""
    files = sorted(folder.glob("*/run.json"), key=lambda file: int(file.parent.name))
    return [json.loads(file.read_text()) for file in files]


def pictures(folder: Path) -> list[np.ndarray]:
    """Return the picture of each point, in order."""
    files = sorted(folder.glob("*/*.png"), key=lambda file: int(file.parent.name))
    return [np.asarray(Image.open(file)).astype(int) for file in files]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> list[np.ndarray]:
    """The two pictures from a single process, with three steps."""
    folder = tmp_path_factory.mktemp("alone")
    assert main.main(["-m", *SMALL, SEEDS, "sampling.num_inference_steps=3", f"hydra.sweep.dir={folder}"]) == 0
    return pictures(folder)


def test_nine_points_load_once(monkeypatch, tmp_path):
    built = []
    plain = Runner.__init__
    monkeypatch.setattr(Runner, "__init__", lambda self, *words: built.append(1) or plain(self, *words))
    words = ["model=demo", "cache=none,teacache,dbcache", "sampling.seed=1,2,3"]
    assert main.main(["-m", *SMALL, *words, f"hydra.sweep.dir={tmp_path}"]) == 0
    assert len(built) == 1
    made = records(tmp_path)
    assert [one["status"] for one in made] == ["complete"] * 9
    assert [one["timings"]["load_s"] > 0 for one in made] == [True] + [False] * 8
    assert {one["timings"]["load_s"] for one in made[1:]} == {0}
    assert {one["timings"]["read_bytes"] for one in made[1:]} == {0}
    assert [(one["config"]["cache"]["_target_"], one["config"]["sampling"]["seed"]) for one in made] == [
        (name, seed) for name in dict.fromkeys(one["config"]["cache"]["_target_"] for one in made) for seed in (1, 2, 3)
    ]
    hashes = {one["outputs"][0]["pixels_sha256"] for one in made}
    assert len(hashes) == 9  # all points draw different pictures


@pytest.mark.full
def test_two_layouts_of_torchruns_ranks_load_twice_and_draw_the_same(alone, tmp_path):
    words = ["parallel=cfg2,ulysses2", "sampling.num_inference_steps=3", "sampling.seed=1,-1,2"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "hydrarun", "-m"]

    asked = [*command, *SMALL, *words, f"hydra.sweep.dir={tmp_path}"]
    done = subprocess.run(asked, env=environment(OMP_NUM_THREADS="1"), capture_output=True, text=True)
    made = records(tmp_path)
    assert [one["status"] for one in made] == ["complete", "failed", "complete"] * 2
    assert [one["timings"]["load_s"] > 0 for one in made if one["outputs"]] == [True, False, True, False]
    for ours, one in zip(pictures(tmp_path), alone * 2, strict=True):
        assert np.abs(ours - one).max() <= 1
    assert made[1]["error"]["type"] == "UsageError"
    assert "2 of 6 points failed:\n  1 (parallel=cfg2 sampling.seed=-1): sampling.seed" in done.stderr
    assert done.returncode == 1  # torchrun's own, for any failure
