"""A run's quality against its reference run, which is drawn once for all caches, and the noise floor; also on ranks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from hydrarun.cli import main
from hydrarun.cli.commands import replay
from hydrarun.cli.main import dispatch_verb
from hydrarun.config.compose import compose_config
from hydrarun.core.errors import RunError
from hydrarun.engine.runner import Runner
from hydrarun.engine.runs.single import follow_single, run_single
from hydrarun.outputs.quality.metrics import compare_outputs, summarize_values
from hydrarun.outputs.quality.scene_judge import judge_picture
from tests.helpers.measured import BOTH, CACHED, config, read
from tests.helpers.parallel_runs import degrees


def test_a_cached_run_is_compared_with_its_twin(run, runner, tmp_path):
    record = run(*CACHED, BOTH)
    assert runner.drawn == ["StepCache", "NoCache"]
    assert record == json.loads((tmp_path / "run" / "run.json").read_text())
    quality = record["quality"]
    pairs = list(zip(read(tmp_path / "run"), read(Path(quality["twin"])), strict=True))
    assert len(pairs) == 2
    want = [compare_outputs(*pair, ["psnr", "ssim"]) for pair in pairs]
    assert [output["quality"] for output in record["outputs"]] == want
    assert all(10 < numbers["psnr"] < 100 and numbers["ssim"] < 1 for numbers in want)
    for name in ("psnr", "ssim"):
        assert quality[name] == summarize_values([numbers[name] for numbers in want])
    assert set(quality) == {"twin", "psnr", "ssim"}


def test_the_runs_own_record_is_without_the_twin(run):
    record = run(*CACHED, BOTH)
    assert record["cache"]["steps"]["transformer"]["positive"]["skipped"] == [1, 2]
    timings = record["timings"]
    assert len(timings["steps_s"]) == 4
    phases = sum(timings[f"{name}_s"] for name in ("load", "encode", "denoise", "decode"))
    assert phases <= timings["total_s"] < phases + timings["save_s"] + timings["quality_s"]
    twin = json.loads((Path(record["quality"]["twin"]) / "run.json").read_text())
    assert len(twin["timings"]["steps_s"]) == 4
    assert "quality_s" not in twin["timings"]
    assert twin["cache"]["steps"]["transformer"]["positive"]["skipped"] == []


def test_the_twin_is_drawn_once_for_all_caches(run, runner, capsys):
    first = run(*CACHED, BOTH)
    second = run("cache=every_n", "cache.gate.n=2", BOTH)
    again = run(*CACHED, "report.metrics=[ssim]")
    assert runner.drawn == ["StepCache", "NoCache", "StepCache", "StepCache"]
    assert second["quality"]["twin"] == first["quality"]["twin"]
    assert again["quality"]["ssim"] == first["quality"]["ssim"] != second["quality"]["ssim"]
    assert "psnr" not in again["quality"]
    assert set(again["outputs"][0]["quality"]) == {"ssim"}


def test_a_run_without_cache_is_its_own_twin_and_that_of_others(run, runner, tmp_path, capsys):
    record = run(BOTH)
    equal = {
        "psnr": dict.fromkeys(("mean", "p95", "worst"), 100.0),
        "ssim": dict.fromkeys(("mean", "p95", "worst"), 1.0),
    }
    assert record["quality"] == {"twin": record["quality"]["twin"], **equal}
    run(*CACHED, BOTH)
    assert runner.drawn == ["NoCache", "StepCache"]
    twin = Path(record["quality"]["twin"])
    assert dispatch_verb(["replay", str(twin / "run.json"), f"hydra.run.dir={tmp_path / 'again'}"]) == 0
    assert capsys.readouterr().out.count("identical pixels") == 2


def test_another_seed_has_another_twin(run, runner):
    places = {run(*CACHED, BOTH, f"sampling.seed={seed}")["quality"]["twin"] for seed in (1, 2)}
    assert len(places) == 2
    assert runner.drawn == ["StepCache", "NoCache"] * 2


def test_nothing_is_measured_unless_asked(run, runner, tmp_path):
    record = run(*CACHED)
    assert runner.drawn == ["StepCache"]
    assert "quality" not in record
    assert "quality" not in record["outputs"][0]
    assert "quality_s" not in record["timings"]
    assert not (tmp_path / "twins").exists()


def test_the_home_folder_is_not_published(run, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    record = run(*CACHED, BOTH, "report.twins=~/mine")
    assert record["quality"]["twin"].startswith("~/mine/")
    assert len(read(Path(record["quality"]["twin"]).expanduser())) == 2


def test_it_is_said_what_is_done(tiny_folder, tmp_path, capsys):
    from hydrarun.core.progress import Progress

    runner = Runner(config(tiny_folder, tmp_path / "twins", *CACHED, BOTH), Progress())
    for _ in range(2):
        place = run_single(runner, runner.config, tmp_path / "run")["quality"]["twin"]
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "reference run" in line] == [
        "drawing the reference run",
        f"the reference run: made, kept in {place}",
        f"the reference run: kept in {place}",
    ]
    assert sum(line.startswith("PSNR, mean / p95 / worst") for line in lines) == 2


# --- what goes wrong -------------------------------------------------------------------------------------------------


def test_a_twin_that_fails_loses_no_output(run, runner, tmp_path, monkeypatch):
    original = runner.draw

    def draw(state, timings, cache=None):
        drawn = original(state, timings, cache)
        if cache["_target_"].endswith("NoCache"):
            drawn.frames[1] = 0
        return drawn

    monkeypatch.setattr(runner, "draw", draw)
    with pytest.raises(RunError, match="^the reference run: the picture for seed 1 .* is all black"):
        run(*CACHED, BOTH)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (record["status"], record["error"]["type"]) == ("failed", "RunError")
    assert len(record["outputs"]) == len(read(tmp_path / "run")) == 2
    assert len(record["timings"]["steps_s"]) == 4
    assert list((tmp_path / "twins").iterdir()) == []


# --- accuracy --------------------------------------------------------------------------------------------------------


def test_accuracy_of_outputs_and_twins_is_the_judges(tmp_path):
    """With two of eight steps computed the second prompt's scene is wrong; with all eight both are right."""
    prompts = ["a large red circle on a yellow background", "a small green star left of a blue square"]
    asked = [
        f"sampling.prompt={json.dumps(prompts)}",
        "sampling.num_inference_steps=8",
        "device=cpu",
        "cache=every_n",
        "cache.gate.n=8",
        "report.metrics=[accuracy]",
        f"report.twins={tmp_path / 'twins'}",
    ]
    config = compose_config(asked)
    record = run_single(Runner(config), config, tmp_path / "run")
    right = {
        name: np.mean([judge_picture(*pair).right for pair in zip(read(folder), prompts, strict=True)])
        for name, folder in {"outputs": tmp_path / "run", "twins": Path(record["quality"]["twin"])}.items()
    }
    assert record["quality"]["accuracy"] == {**right, "count": 2}
    assert right["outputs"] < right["twins"] == 1
    assert "quality" not in record["outputs"][0]


# --- the command, replays, ranks -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["report.metrics=[psrn]"],
            "report.metrics (command line): 'psrn' is none of psnr, ssim, snr, accuracy. Did you mean 'psnr'?",
        ),
        (
            ["report.noise_floor=[repeat]"],
            "report.noise_floor (command line): without report.metrics it has no effect: report.metrics=[psnr,ssim]",
        ),
        (
            ["report.metrics=[accuracy]", "model=flux_dev", "sampling.prompt=a cat"],
            "report.metrics (command line): 'accuracy': model flux_dev has no judge (model.judge). Use psnr, ssim.",
        ),
        (
            ["report.metircs=[psnr]"],
            "report.metircs (command line): unknown key. Did you mean 'metrics'? Known: metrics, noise_floor, "
            "objectives, twins.",
        ),
    ],
)
def test_mistakes_on_the_command_line(words, line, capsys):
    assert main.main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith(line)
    assert len(error.splitlines()) == 1


def test_a_replay_measures_only_when_asked(run, runner, tmp_path):
    run(*CACHED, BOTH, "report.noise_floor=[repeat]")
    file = replay.load_recorded_run(tmp_path / "run" / "run.json")
    assert file.config["report"]["metrics"] == ["psnr", "ssim"]
    assert replay.rebuild_config(file, [])["report"] == {
        "metrics": [],
        "noise_floor": [],
        "objectives": [],
        "twins": "outputs/twins",
    }
    asked = ["report.metrics=[ssim]", "report.noise_floor=[repeat]", f"report.twins={tmp_path}"]
    assert replay.rebuild_config(file, asked)["report"] == {
        "metrics": ["ssim"],
        "noise_floor": ["repeat"],
        "objectives": [],
        "twins": str(tmp_path),
    }


def on_a_rank(asked: dict, folder: Path) -> tuple[list[int], dict | None]:
    """Run twice, then with the kept reference run. Return how often this rank drew, and rank 0's `quality`."""
    import torch.distributed as dist

    runner = Runner({**asked, "parallel": degrees(cfg_degree=2)})
    counts, draw = [], runner.draw

    def counted(*arguments):
        counts[-1] += 1
        return draw(*arguments)

    runner.draw = counted
    record = None
    for number in range(2):
        counts.append(0)
        if dist.get_rank() == 0:
            record = run_single(runner, runner.config, folder / str(number))
        else:
            follow_single(runner, runner.config)
    return counts, record and record["quality"]


def test_ranks_draw_the_same_in_the_same_order(tiny_folder, tmp_path, pool):
    asked = config(tiny_folder, tmp_path / "twins", *CACHED, BOTH, "report.noise_floor=[repeat]")
    (first, quality), (second, nothing) = pool(2, on_a_rank, asked, tmp_path)
    assert first == second == [3, 2]
    assert nothing is None
    assert 10 < quality["psnr"]["mean"] < 100
    assert quality["noise_floor"]["repeat"]["psnr"]["worst"] == 100.0
