"""The reference run of a run with quantized weights uses the weights on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hydrarun.core.errors import OutOfMemoryError, RunError
from hydrarun.engine.runner import Runner
from hydrarun.engine.runs.single import follow_single, run_single
from hydrarun.outputs.quality.metrics import compare_outputs
from tests.helpers.measured import BOTH, CACHED, config, read
from tests.helpers.parallel_runs import degrees

INT8 = "quantization=int8_weight_only"


@pytest.fixture
def built(monkeypatch) -> list[str]:
    """The quantization of each runner that is built from now on."""
    seen, original = [], Runner.__init__

    def remember(self, asked, *arguments):
        seen.append(asked["quantization"]["_target_"].rpartition(".")[2])
        original(self, asked, *arguments)

    monkeypatch.setattr(Runner, "__init__", remember)
    return seen


def asked(folder: Path, tmp_path: Path, *more: str) -> dict[str, Any]:
    return config(folder, tmp_path / "twins", BOTH, *more)


def run(wanted: dict[str, Any], folder: Path) -> dict[str, Any]:
    return run_single(Runner(wanted), wanted, folder)


def test_it_is_drawn_with_the_weights_on_disk_and_kept(tiny_folder, tmp_path, built):
    runner = Runner(asked(tiny_folder, tmp_path, INT8))
    quality = run_single(runner, runner.config, tmp_path / "run")["quality"]
    assert built == ["TorchAO", "NoQuantization"]
    plain = run(asked(tiny_folder, tmp_path), tmp_path / "plain")
    assert plain["quality"]["twin"] == quality["twin"]
    for twin, drawn in zip(read(Path(quality["twin"])), read(tmp_path / "plain"), strict=True):
        assert np.array_equal(twin, drawn)
    pairs = zip(read(tmp_path / "run"), read(tmp_path / "plain"), strict=True)
    each = [compare_outputs(*pair, ["psnr"])["psnr"] for pair in pairs]
    assert quality["psnr"]["mean"] == pytest.approx(np.mean(each))
    assert 20 < quality["psnr"]["mean"] < 100
    record = json.loads((Path(quality["twin"]) / "run.json").read_text())
    assert record["quantization"] == "none"
    assert record["config"]["quantization"]["_target_"].endswith("NoQuantization")


def test_one_that_is_kept_is_not_drawn_again(tiny_folder, tmp_path, built):
    run(asked(tiny_folder, tmp_path), tmp_path / "plain")
    runner = Runner(asked(tiny_folder, tmp_path, INT8, *CACHED))
    assert run_single(runner, runner.config, tmp_path / "run")["quality"]["psnr"]["mean"] < 100
    assert built == ["NoQuantization", "TorchAO"]


def test_the_noise_floor_is_that_of_the_weights_on_disk(tiny_folder, tmp_path, built):
    runner = Runner(asked(tiny_folder, tmp_path, INT8, "report.noise_floor=[repeat]"))
    quality = run_single(runner, runner.config, tmp_path / "run")["quality"]
    assert quality["noise_floor"]["repeat"]["psnr"]["worst"] == 100.0 > quality["psnr"]["worst"]
    assert built == ["TorchAO", "NoQuantization"]


def test_where_both_do_not_fit_the_outputs_stay(tiny_folder, tmp_path, monkeypatch):
    def full(self, *arguments):
        raise OutOfMemoryError("out of memory in denoise")

    monkeypatch.setattr(Runner, "redraw", full)
    with pytest.raises(RunError) as caught:
        run(asked(tiny_folder, tmp_path, INT8), tmp_path / "run")
    assert str(caught.value) == (
        "the unquantized weights do not fit next to the quantized ones: draw the reference run first, with the same"
        " command and quantization=none"
    )
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (record["status"], len(record["outputs"])) == ("failed", 2)


def on_a_rank(wanted: dict[str, Any], folder: Path) -> dict[str, Any] | None:
    """Run on this rank. Return rank 0's `quality`."""
    import torch.distributed as dist

    runner = Runner({**wanted, "parallel": degrees(cfg_degree=2)})
    return (
        run_single(runner, runner.config, folder)["quality"]
        if dist.get_rank() == 0
        else follow_single(runner, runner.config)
    )


def test_ranks_load_it_together(tiny_folder, tmp_path, pool):
    wanted = asked(tiny_folder, tmp_path, INT8, "report.noise_floor=[repeat]")
    quality, nothing = pool(2, on_a_rank, wanted, tmp_path / "run")
    assert nothing is None
    assert 20 < quality["psnr"]["mean"] < 100
    assert quality["noise_floor"]["repeat"]["psnr"]["worst"] == 100.0
