"""Sweeps by engines beyond one process, run for real in their local modes: `make test-all`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

POINTS = ["sampling.num_inference_steps=4", "device=cpu"]


def sweep(folder: Path, *words: str) -> subprocess.CompletedProcess:
    """The command with `-m`, in an empty folder; points go to `here/`."""
    settings = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, "-m", "hydrarun", "-m", *POINTS, "hydra.sweep.dir=here", *words]
    environment = {**os.environ, **settings}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def records(folder: Path) -> list[dict]:
    """run.json of each point, by number."""
    files = sorted((folder / "here").glob("*/run.json"), key=lambda file: int(file.parent.name))
    return [json.loads(file.read_text()) for file in files]


def test_ray_keeps_what_is_loaded_and_a_failure_travels_back(tmp_path):
    one_gpu = ["+hydra.launcher.ray.init.num_gpus=1", "+hydra.launcher.ray.remote.num_gpus=1"]  # that Ray believes in
    done = sweep(tmp_path, "hydra/launcher=ray", *one_gpu, "sampling.height=128,-8,64")
    first, failed, last = records(tmp_path)
    assert [one["status"] for one in (first, failed, last)] == ["complete", "failed", "complete"]
    assert first["timings"]["load_s"] > 0
    assert last["timings"]["load_s"] == 0  # the same worker
    assert failed["error"]["message"] == "sampling.height (command line): -8 is below 1."
    assert done.returncode == 2
    assert "ray: max_calls=0: a worker keeps what it has loaded for its next point" in done.stderr
    assert "1 of 3 points failed:\n  1 (sampling.height=-8): sampling.height (command line): -8 is below 1." in (
        done.stderr
    )


def test_submitit_runs_each_point_in_a_process_of_its_own(tmp_path):
    recipe = tmp_path / "mine.yaml"  # recipes are read by a plugin of ours, in the new process too
    recipe.write_text("sampling: {true_cfg_scale: 1.5}")
    words = ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=5", "recipe=./mine.yaml"]
    done = sweep(tmp_path, *words, "sampling.seed=3,-1", "model.path=package:demo,nowhere/at-all")
    assert [one["status"] for one in records(tmp_path)] == ["complete", "failed", "failed", "failed"]
    first, refused, unknown, _ = records(tmp_path)
    assert first["config"]["sampling"]["true_cfg_scale"] == 1.5
    assert "-1" in refused["error"]["message"]
    assert "nowhere/at-all" in unknown["error"]["message"]
    assert done.returncode == 2
    assert "3 of 4 points failed:" in done.stderr


def test_a_job_that_ranks_take_part_in(tmp_path):
    done = sweep(tmp_path, "hydra/launcher=submitit_local", "hydra.launcher.timeout_min=5", "parallel=cfg2")
    assert done.returncode == 0, done.stderr
    assert [one["status"] for one in records(tmp_path)] == ["complete"]


@pytest.fixture
def search(tmp_path):
    """A search for speed and quality, by words of its own."""
    base = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", "hydra.sweeper.n_jobs=1"]
    return lambda *words: sweep(tmp_path, *base, *words)


def test_optuna_weighs_speed_against_quality(search, tmp_path):
    goals = ["report.metrics=[psnr]", "report.objectives=[denoise_s,psnr]"]
    space = ["cache=first_block", "cache.gate.threshold=interval(0.02,0.5)"]
    done = search(*goals, "hydra.sweeper.direction=[minimize,maximize]", *space)
    assert done.returncode == 0, done.stderr
    found = {
        (one["timings"]["denoise_s"], one["quality"]["psnr"]["mean"]): one["config"]["cache"]["gate"]["threshold"]
        for one in records(tmp_path)
    }
    assert len(found) == 3
    best = yaml.safe_load((tmp_path / "here" / "optimization_results.yaml").read_text())["solutions"]
    assert best
    for solution in best:
        assert found[tuple(solution["values"])] == solution["params"]["cache.gate.threshold"]
    assert [one["timings"]["load_s"] > 0 for one in records(tmp_path)] == [True, False, False]


def test_optuna_stops_at_a_failed_point_unless_told_otherwise(search, tmp_path):
    words = ["report.objectives=[denoise_s]", "sampling.height=choice(-8,64)", "hydra.sweeper.sampler.seed=1"]
    done = search(*words, "hydra.sweeper.max_failure_rate=1.0")
    states = [one["status"] for one in records(tmp_path)]
    assert (len(states), {*states}) == (3, {"complete", "failed"})
    assert done.returncode == 2
    assert f"{states.count('failed')} of 3 points failed:" in done.stderr
    stopped = search(*words)
    assert f"1 of {states.index('failed') + 1} point" in stopped.stderr
    assert stopped.returncode == 2


def test_optuna_needs_to_be_told_what_is_good(search, tmp_path):
    done = search("sampling.seed=1,2")
    assert done.returncode == 2
    assert done.stderr.startswith("report.objectives has 0, and hydra.sweeper.direction 1: ")
    assert not (tmp_path / "here").exists()
