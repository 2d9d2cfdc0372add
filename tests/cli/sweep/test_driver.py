"""The order of a sweep, its dry run, and the records of failed points."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest

from hydrarun.cli import main
from hydrarun.cli.sweep import dry_run, order, point
from hydrarun.cli.sweep.objectives import read_objectives
from hydrarun.cli.sweep.space import read_sweep
from hydrarun.config.checks import report
from hydrarun.config.compose import compose_config
from hydrarun.core.errors import RunError, UsageError
from hydrarun.core.quoting import quote_overrides
from hydrarun.engine.ranks import launch, worker
from hydrarun.outputs import failure_record


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """The seeds that reached the mock run, in an empty folder; seeds 7, 8 and 9 fail."""
    seen: list[int] = []
    errors = {7: RunError("no weights"), 8: UsageError("too large", "by far"), 9: ZeroDivisionError("a bug")}

    def run(config, output_dir):
        seed = config["sampling"]["seed"]
        seen.append(seed)
        if seed in errors:
            raise errors[seed]
        if config["input"]["prompts"]:
            (output_dir / "ledger.jsonl").touch()  # as a batch does
        record = {"format": 1, "status": "complete", "outputs": [], "seed": seed}
        (output_dir / "run.json").write_text(json.dumps(record))
        return record

    monkeypatch.setattr(launch, "run_configuration", run)
    monkeypatch.chdir(tmp_path)
    return seen


def record(folder: str) -> dict:
    return json.loads(Path(folder, "run.json").read_text())


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (["sampling.seed=1,2", "model=a,b"], ["model=a,b", "sampling.seed=1,2"]),
        (["cache=a,b", "+model.path=x,y", "seed=1,2", "recipe=a,b"],
         ["+model.path=x,y", "recipe=a,b", "cache=a,b", "seed=1,2"]),
        (["cache=a,b", "plan=none,auto", "device=cpu"], ["plan=none,auto", "device=cpu", "cache=a,b"]),
        # a later value of the same key counts, and stays the later one
        (["sampling.seed=3", "model=a,b", "sampling.seed=1,2"], ["model=a,b", "sampling.seed=3", "sampling.seed=1,2"]),
        (["sampling.seed=1,2", "model=x", "model=a,b"], ["model=x", "model=a,b", "sampling.seed=1,2"]),
        # unchanged, because another order saves no load
        (["sampling.seed=1,2", "model=a"], ["sampling.seed=1,2", "model=a"]),
        (["model=a,b", "device=cpu", "sampling.seed=1,2"], ["model=a,b", "device=cpu", "sampling.seed=1,2"]),
        (["sampling.seed=1,2", "model=a,b", "model=x"], ["sampling.seed=1,2", "model=a,b", "model=x"]),
    ],
)  # fmt: skip
def test_what_is_built_varies_slowest(before, after):
    assert order.order_overrides(before) == after
    assert [*order.describe_reorder(before, before)] == []


def test_all_that_is_built_from_is_slow_and_nothing_else():
    assert {name for name in compose_config([]) if order.is_slow(f"{name}.x=1")} == {*worker.BUILT_FROM, "plan"}
    assert not order.is_slow("cache/predictor=taylor")
    assert not order.is_slow("models=1")


def test_a_changed_order_is_said(drawn, capsys):
    assert main.main(["-m", "sampling.seed=1,2", "attention=sdpa,flex"]) == 0
    assert drawn == [1, 2, 1, 2]
    said = "order: attention varies slowest, so that consecutive points share a load\n"
    assert capsys.readouterr().err.startswith(f"{said}[0] attention=sdpa sampling.seed=1\n")
    assert main.main(["-m", "attention=sdpa", "sampling.seed=1"]) == 0
    assert "order:" not in capsys.readouterr().err


SWEEPS = [
    ["sampling.seed=range(3,5)", "attention=glob([s*,f*],exclude=[sage,flash])"],
    ["recipe=demo/quick,none", 'sampling.prompt=choice("a, b")', "sampling.seed=1", "sampling.seed=4,5"],
]


@pytest.mark.parametrize("words", SWEEPS)
def test_the_points_that_are_listed_are_those_that_run(words, drawn, capsys):
    listed = read_sweep(quote_overrides(words), ["-m"]).points
    assert len(listed) > 1
    assert main.main(["-m", *words]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("[")]
    assert lines == [f"[{number}] {' '.join(point)}" for number, point in enumerate(listed)]


def test_options_of_ones_own_are_listed_too(drawn, tmp_path, capsys):
    (tmp_path / "mine" / "sampling").mkdir(parents=True)
    (tmp_path / "mine" / "sampling" / "small.yaml").write_text("height: 64\n")
    sweep = read_sweep(["sampling=small,default"], ["-m", "--config-dir", "mine"])
    assert [sweep.compose(point)[0]["sampling"]["height"] for point in sweep.points] == [64, 128]
    assert main.main(["-m", "sampling=small,default", "--config-dir=mine"]) == 0


def test_an_interval_is_no_list(drawn, capsys):
    assert main.main(["-m", "sampling.true_cfg_scale=interval(1,2)"]) == 2
    assert capsys.readouterr().err == "BasicSweeper does not support sweep type : INTERVAL_SWEEP\n"
    assert drawn == []


def test_failed_points_are_recorded_and_named_and_the_sweep_goes_on(drawn, capsys):
    words = ["-m", "sampling.seed=7,8,9,-1,2", "sampling.height=64", "hydra.sweep.dir=here"]
    assert main.main(words) == 2
    assert drawn == [7, 8, 9, 2]
    below = "sampling.seed (command line): -1 is not a whole number from 0 to 2**63-1, or a list of such numbers."
    assert [record(f"here/{number}").get("error") for number in range(5)] == [
        {"type": "RunError", "message": "no weights"},
        {"type": "UsageError", "message": "too large\nby far"},
        {"type": "ZeroDivisionError", "message": "a bug"},
        {"type": "UsageError", "message": below},
        None,
    ]
    error = capsys.readouterr().err
    assert error.count("Traceback") == 1
    assert error.endswith(
        "4 of 5 points failed:\n"
        "  0 (sampling.seed=7): no weights\n"
        "  1 (sampling.seed=8): too large\n"
        "  2 (sampling.seed=9): ZeroDivisionError: a bug\n"
        f"  3 (sampling.seed=-1): {below}\n"
        f"report: {Path.cwd() / 'here' / 'report.html'}\n"
    )


def test_fail_fast_ends_a_sweep_at_its_first_failure(drawn, capsys):
    words = ["-m", "sampling.seed=1,7,2", "hydra.sweep.dir=here"]
    assert main.main([*words, "--fail-fast"]) == 1
    assert drawn == [1, 7]
    assert "1 of 3 points failed:\n  1 (sampling.seed=7): no weights\n" in capsys.readouterr().err
    assert main.main([*words, "--fail-fast", "hydra/launcher=none_of_ours"]) == 2


def test_a_sweep_of_a_file_of_prompts_goes_to_the_same_place_again(drawn, tmp_path):
    Path("prompts.txt").write_text("a cat\n")
    words = ["-m", "sampling.seed=1,2", "input.prompts=prompts.txt"]
    assert [main.main(words), main.main(words)] == [0, 0]
    assert main.main([*words, "cache=none,every_n"]) == 0
    assert sorted(len(list(place.glob("*/run.json"))) for place in Path("outputs").iterdir()) == [2, 4]


def test_what_the_record_of_a_refused_point_holds(drawn, monkeypatch):
    monkeypatch.setenv("HOME", str(Path.cwd()))
    images = f"input.images={Path.cwd()}/none.png"
    assert main.main(["-m", images, "model=qwen_image_edit", "sampling.prompt=x", "hydra.sweep.dir=here"]) == 2
    made = record("here/0")
    assert [*made] == ["format", "status", "error", "created", "config_hash", "outputs", "config"]
    assert (made["format"], made["status"], made["outputs"]) == (1, "failed", [])
    assert made["config"]["input"]["images"] == ["~/none.png"]
    assert made["error"]["message"].startswith("input.images: ~/none.png: ")


def test_an_older_record_is_not_the_points(drawn, capsys):
    """The record of an earlier sweep into the same folder is not taken for a result of this one."""
    assert main.main(["-m", "sampling.seed=7", "hydra.sweep.dir=here"]) == 1
    assert record("here/0")["error"]["message"] == "no weights"
    assert "1 of 1 point failed:" in capsys.readouterr().err
    (Path("here") / "0").rename("here/1")
    assert main.main(["-m", "sampling.seed=1", "hydra.sweep.dir=here"]) == 0
    assert capsys.readouterr().err.startswith("[0] sampling.seed=1\nreport: ")


def test_the_points_of_a_finished_sweep_are_kept(drawn, capsys):
    words = ["-m", "sampling.seed=1,2", "hydra.sweep.dir=here"]
    assert main.main(words) == 0
    before = Path("here/0/run.json").read_bytes()
    capsys.readouterr()
    assert main.main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("hydra.sweep.dir=")
    assert line.endswith("holds the run of another time; choose another folder, or delete this one")
    assert drawn == [1, 2]
    assert Path("here/0/run.json").read_bytes() == before


CONFIG = compose_config([])
BELOW = "sampling.height (command line): -8 is below 1."


def fails(folder: Path, error: Exception, own: dict | None = None) -> dict:
    """Return the record of a failing run, which may have written one itself (`own`)."""

    def run() -> None:
        with failure_record.record_failure(CONFIG, folder):
            if own:
                (folder / "run.json").write_text(json.dumps(own))
            raise error

    with pytest.raises(type(error)):
        run()
    return record(str(folder))


def test_a_runs_own_record_stays_with_the_error_that_came_first(tmp_path):
    own = {"format": 1, "status": "failed", "error": {"type": "ValueError", "message": "odd"}, "outputs": [1]}
    assert fails(tmp_path, ValueError("odd"), own) == own
    assert fails(tmp_path, RunError("Traceback …", "rank 0: ValueError: odd"), own) == own
    first = fails(tmp_path, RunError("rank 1 was killed (signal 9)"), own)
    assert first == {**own, "error": {"type": "RunError", "message": "rank 1 was killed (signal 9)"}}
    late = fails(tmp_path, OSError("no space"), {"format": 1, "status": "complete", "outputs": [1]})
    assert late == {**own, "error": {"type": "OSError", "message": "no space"}}


def test_a_record_without_paths_that_are_none(tmp_path):
    config = {**CONFIG, "input": {**CONFIG["input"], "images": 3}}
    with pytest.raises(UsageError), failure_record.record_failure(config, tmp_path / "new"):
        raise UsageError("hf_abcdefghijk is no path")
    made = record(str(tmp_path / "new"))
    assert made["error"]["message"] == "[removed] is no path"
    assert made["config"]["input"]["images"] == 3


def test_points_that_leave_nothing_are_missed(drawn, monkeypatch, capsys):
    monkeypatch.setattr(launch, "run_configuration", lambda config, output_dir: {})
    assert main.main(["-m", "sampling.seed=1,2", "hydra.sweep.dir=here"]) == 1
    folder = Path("here").absolute()
    text = f"2 of 2 points left no run.json in {folder}: do all machines share that folder?\n"
    assert capsys.readouterr().err.endswith(text)


def test_ctrl_c_ends_a_sweep_and_failures_are_still_named(drawn, monkeypatch, capsys):
    run = launch.run_configuration

    def interrupted(config, output_dir):
        if config["sampling"]["seed"] == 1:
            raise KeyboardInterrupt
        return run(config, output_dir)

    monkeypatch.setattr(launch, "run_configuration", interrupted)
    assert main.main(["-m", "sampling.seed=7,1,2"]) == 130
    assert drawn == [7]
    assert "1 of 3 points failed:\n  0 (sampling.seed=7): no weights\nreport: " in (said := capsys.readouterr().err)
    assert said.endswith("report.html\ninterrupted\n")


def test_a_folder_with_any_name(drawn, tmp_path):
    name = "a (1) = 'é"
    assert main.main(["-m", "sampling.seed=1,2", f"hydra.sweep.dir={name}"]) == 0
    assert sorted(path.name for path in (tmp_path / name).iterdir()) == [
        *(".lock", "0", "1", "multirun.yaml", "report.html", "report.json")
    ]


def test_a_point_can_be_sent_elsewhere():
    """Launchers pickle the task by name for a process that has not read the command line."""
    assert pickle.loads(pickle.dumps(point.run_point)) is point.run_point


@pytest.mark.parametrize("option", ["launcher=ray", "launcher=submitit_slurm", "sweeper=optuna"])
def test_a_missing_extra_is_named(option, drawn, monkeypatch, capsys):
    from hydra.core.config_store import ConfigStore

    kind, _, name = option.partition("=")
    monkeypatch.setitem(ConfigStore.instance().repo["hydra"], kind, {})
    assert main.main(["-m", f"hydra/{option}", "sampling.seed=1,2"]) == 2
    extra = {"ray": "ray", "submitit_slurm": "slurm", "optuna": "optuna"}[name]
    assert capsys.readouterr().err == f"hydra/{option}: is not installed: pip install 'hydrarun[{extra}]'\n"


RECORD = {
    "timings": {"total_s": 9.0, "denoise_s": 6.0, "steps_s": [5.0, 1.0, 2.0, 3.0]},
    "memory": {"peak_host_bytes": 11, "peak_device_bytes": 12},
    "quality": {"psnr": {"mean": 40.0}, "ssim": {"mean": 0.9}, "accuracy": {"outputs": 0.5, "twins": 1.0}},
}
RECORD["quality"]["snr"] = {"mean": 30.0}  # for sounds, which have none of the other measures


def test_objectives_are_numbers_of_the_run():
    names = [*report.MEASURED, *report.METRICS]
    assert read_objectives(RECORD, names) == [9.0, 6.0, 2.0, 11, 12, 40.0, 0.9, 30.0, 0.5]
    assert read_objectives(RECORD, ["psnr"]) == 40.0
    assert read_objectives({"timings": {"steps_s": [4.0]}}, ["steady_step_s"]) == 4.0


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["report.objectives=[psnr]"],
         "report.objectives (command line): 'psnr' is not measured: report.metrics=[psnr]"),
        (["report.objectives=[ssim]", "report.metrics=[psnr]"],
         "report.objectives (command line): 'ssim' is not measured: report.metrics=[psnr,ssim]"),
        (["report.objectives=[denoise]"], "report.objectives (command line): 'denoise' is none of total_s, denoise_s, "
         "steady_step_s, peak_host_bytes, peak_device_bytes, psnr, ssim, snr, accuracy. Did you mean 'denoise_s'?"),
        (["report.objectives=[total_s,total_s]"], "report.objectives (command line): lists 'total_s' twice."),
    ],
)  # fmt: skip
def test_objectives_that_cannot_be(words, text):
    with pytest.raises(UsageError) as raised:
        compose_config(words)
    assert str(raised.value) == text


def test_objectives_are_for_a_sweeper_that_reads_them(drawn, capsys):
    assert main.main(["-m", "report.objectives=[total_s]", "sampling.seed=1,2"]) == 2
    assert capsys.readouterr().err.startswith("report.objectives: for a sweeper that searches: add ")
    assert main.main(["report.objectives=[total_s]"]) == 0  # a single run, as when a point of such a sweep is repeated
    assert drawn == [0]


def dry(capsys, *words: str) -> tuple[int, list[str]]:
    """Return the exit code and the lines of a dry run."""
    code = main.main([*words, "--dry-run"])
    return code, capsys.readouterr().out.splitlines()


def test_a_dry_run_lists_points_by_load_and_runs_nothing(drawn, capsys, tmp_path):
    words = ["sampling.seed=1,2", "attention=sdpa,flex", "sampling.height=64,-8,100", "device=cpu"]
    code, lines = dry(capsys, "-m", *words)
    assert code == 1
    assert lines[:4] == [
        "12 points, 2 loads",
        "load 1: model=demo attention=sdpa device=cpu",
        lines[2],
        f"   1  attention=sdpa sampling.seed=1 sampling.height=-8   refused: {BELOW}",
    ]
    assert lines[2].startswith("   0  attention=sdpa sampling.seed=1 sampling.height=64   fits: 0.02 GiB of ")
    assert "sampling.height=100  refused: sampling.height=100: this checkpoint needs a multiple of 16" in lines[4]
    assert lines[8] == "load 2: model=demo attention=flex device=cpu"
    assert len(lines) == 15
    assert drawn == []
    assert [*tmp_path.iterdir()] == []


def test_a_dry_run_of_one_run(drawn, capsys):
    code, lines = dry(capsys, "sampling.seed=3", "sampling.height=64")
    assert code == 0
    assert lines[:2] == ["1 point, 1 load", "load 1: model=demo"]
    assert lines[2].startswith("   0  sampling.seed=3 sampling.height=64  fits: ")
    assert main.main(["sampling.seed=3,4", "--dry-run"]) == 2
    assert "add -m to run them all" in capsys.readouterr().err


def test_every_conflict_is_a_line(drawn, capsys):
    words = ["parallel=ring2", "attention=flex", "parallel.hsdp_degree=2", "offload=model", "device=cuda"]
    code, lines = dry(capsys, *words, "plan.device=h100")
    assert code == 1
    assert len(lines) == 3  # further conflicts are indented
    assert "refused: " in lines[1]
    assert lines[2].startswith(" " * 20)


def test_too_large_is_said_with_what_would_fit(drawn, capsys):
    words = ["model=wan22_t2v_a14b", "sampling.prompt=x", "plan.device=h100", "sampling.num_frames=5"]
    code, lines = dry(capsys, "-m", *words, "sampling.seed=1,2", "offload=none,text_encoder")
    too_large = "does NOT fit: 80.13 GiB of 78.20 GiB, 1.93 GiB too much; would with quantization=fp8_weight_only"
    assert code == 1
    assert lines == [
        "4 points, 2 loads",
        "load 1: model=wan22_t2v_a14b plan.device=h100 offload=none",
        f"   0  offload=none sampling.seed=1          {too_large}",
        f"   1  offload=none sampling.seed=2          {too_large}",
        "load 2: model=wan22_t2v_a14b plan.device=h100 offload=text_encoder",
        "   2  offload=text_encoder sampling.seed=1  fits: 69.55 GiB of 78.20 GiB",
        "   3  offload=text_encoder sampling.seed=2  fits: 69.55 GiB of 78.20 GiB",
    ]
    code, lines = dry(capsys, *words, "plan=auto")
    assert (code, lines[0]) == (0, "1 point, 1 load")
    assert lines[2].endswith(too_large)


def test_equal_plans_are_made_once(drawn, capsys, monkeypatch):
    made = []
    make = dry_run.make_plan
    monkeypatch.setattr(dry_run, "make_plan", lambda *words: made.append(1) or make(*words))
    code, _ = dry(capsys, "-m", "sampling.seed=1,2,3", "cache=none,first_block", "sampling.height=64")
    assert (code, len(made)) == (0, 2)


@pytest.mark.parametrize("flag", ["--help", "--cfg", "--info"])
def test_a_dry_run_goes_with_what_would_run(flag, drawn, capsys):
    assert main.main(["--dry-run", flag, *(["job"] if flag == "--cfg" else [])]) == 2
    assert capsys.readouterr().err == f"--dry-run cannot be combined with {flag}: leave one of them out\n"


def test_no_file_is_needed_to_refuse_a_dry_run(capsys):
    assert main.main(["-m", "--dry-run", "modle=demo"]) == 2
    assert "Did you mean 'model'?" in capsys.readouterr().err
    assert os.environ["HYDRA_FULL_ERROR"] == "1"
