"""Ranks from their start to their end: real processes on gloo, most with a fake runner (`fake_rank`)."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

import hydrarun
from hydrarun import __main__
from hydrarun.cli import main
from hydrarun.config import targets
from hydrarun.config.compose import compose_config
from hydrarun.core.distributed.rank import RankInfo, threads_per_rank
from hydrarun.core.errors import UsageError
from hydrarun.engine.ranks import launch, local_group, worker
from tests.helpers.paths import environment

TWO = ["parallel=ulysses2", "device=cpu"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "tests.helpers.fake_rank"]


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """The command's ranks use the fake runner, in an empty folder; the user has allowed a class."""
    monkeypatch.setattr(targets, "_allowed_by_user", {"my.Own"})
    monkeypatch.setattr(local_group, "WORKER", "tests.helpers.fake_rank")
    monkeypatch.chdir(tmp_path)


def alive(pid: int) -> bool:
    """Return whether the process runs. A zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(pids: list[int], seconds: float = 10) -> bool:
    """Return whether all end within `seconds`."""
    deadline = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(alive, pids))


def records(folder: Path) -> list[dict]:
    return [json.loads(file.read_text()) for file in sorted(folder.rglob("run.json"))]


def test_a_sweep_keeps_its_ranks_survives_a_failure_and_names_it_once(fake, tmp_path, capfd):
    prompts = '"fine","so so","1 ZeroDivisionError","well","1 exit 3"'
    words = [*TWO, "-m", f"sampling.prompt=choice({prompts})", "sampling.seed=7", "hydra.sweep.dir=here"]
    assert main.main(words) == 1
    first, second, failed, last, silent = records(tmp_path)
    assert (failed["status"], failed["error"]["type"]) == ("failed", "RunError")
    assert failed["error"]["message"].endswith("rank 1: ZeroDivisionError: the sky is green")
    assert [first[key] for key in ("seed", "device", "total", "jobs", "load_s")] == [7, "cpu", 2.0, 1, 1.0]
    assert (first["threads"], first["allowed"]) == (threads_per_rank(2), ["my.Own"])
    assert second == {**first, "prompt": "so so", "jobs": 2, "load_s": 0.0, "read_bytes": 0}
    assert silent["error"]["message"] == "rank 1 ended with exit code 3\n  about to exit 3"  # not that rank 0 lost it
    assert not set(last["pids"]) & set(first["pids"])
    assert gone(first["pids"] + last["pids"])
    error = capfd.readouterr().err
    assert error.count("Traceback") == 1
    point = '2 (sampling.prompt="1 ZeroDivisionError")'
    closing = f"2 of 5 points failed:\n  {point}: rank 1: ZeroDivisionError: the sky is green\n"
    assert closing in error
    assert error.partition(closing)[0].count("the sky is green") == 1
    assert "\nrank 1: ZeroDivisionError: the sky is green\n" in error
    assert sorted(path.name for path in (tmp_path / "here" / "0").glob("[!.]*")) == ["pids.json", "run.json"]


def test_large_jobs_pass_and_another_build_gets_other_ranks(fake):
    ranks = local_group.RanksExecutor()
    folder = {"output_dir": str(Path.cwd())}
    config = compose_config(TWO)
    large = "fine " + "x" * 9 * 2**20
    first = ranks.run_job("run", {**config, "sampling": {**config["sampling"], "prompt": large}}, folder)
    assert first["prompt"] == large
    second = ranks.run_job("run", {**config, "dtype": "bfloat16"}, folder)
    assert gone(first["pids"], 1)
    assert second["jobs"] == 1
    start = time.monotonic()
    with pytest.raises(UsageError) as raised:
        ranks.run_job("run", {**config, "dtype": "bfloat16", "sampling": {"prompt": "1 UsageError"}}, folder)
    assert str(raised.value) == "the sky is green"
    assert gone(second["pids"], 1)
    assert time.monotonic() - start < 10


def test_an_aborted_rank_is_named(fake, capfd, tmp_path):
    assert main.main([*TWO, "sampling.prompt=1 SIGABRT", "hydra.run.dir=here"]) == 1
    file = tmp_path / "here" / "pids.json"  # written right before
    pids = json.loads(file.read_text())
    assert time.time() - file.stat().st_mtime < 10
    assert gone(pids, 0)
    error = capfd.readouterr().err
    assert "rank 1 was killed (signal 6)\n" in error
    assert error.splitlines()[-1] == "  about to SIGABRT"
    assert "Traceback" not in error


def started(
    tmp_path: Path, command: Sequence[str] = (sys.executable, "-m", "tests.helpers.fake_rank"), slow: int = 1
) -> tuple[subprocess.Popen, list[int]]:
    """A command in the middle of a job, and its ranks, of which `slow` is slow."""
    driver = subprocess.Popen(
        [*command, *TWO, f"sampling.prompt={slow} sleep", "hydra.run.dir=here"],
        cwd=tmp_path,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        # a shell's background job ignores Ctrl-C, and its child processes inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    file = tmp_path / "here" / "pids.json"
    deadline = time.monotonic() + 60
    while not (file.exists() and file.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return driver, json.loads(file.read_text())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_all(tmp_path, number):
    driver, pids = started(tmp_path)
    assert all(map(alive, pids))
    driver.send_signal(number)
    assert driver.wait(20) == 128 + number
    assert gone(pids, 0)
    assert driver.stderr.read().splitlines()[-1] == "interrupted"
    assert sorted(path.name for path in (tmp_path / "here").glob("[!.]*")) == ["pids.json", "run.json"]
    assert records(tmp_path)[0]["status"] == "interrupted"


def test_the_ranks_of_a_killed_driver_die(tmp_path):
    driver, pids = started(tmp_path)
    driver.kill()
    driver.wait()
    assert gone(pids)


def torchrun(tmp_path: Path, *words: str) -> subprocess.CompletedProcess:
    return subprocess.run([*TORCHRUN, *words], cwd=tmp_path, env=environment(), capture_output=True, text=True)


def test_torchrun(tmp_path):
    """One directory for each point, written once. The ranks are torchrun's and end at the first failure."""
    prompts = 'sampling.prompt=choice("fine","so so","1 RunError","never")'
    done = torchrun(tmp_path, *TWO, "-m", prompts, "hydra.sweep.dir=here", "--allow-target", "my.Own")
    first, second, failed = records(tmp_path)
    assert failed["error"] == {"type": "RunError", "message": "the sky is green"}
    assert (first["total"], first["jobs"], first["allowed"]) == (2.0, 1, ["my.Own"])
    assert second == {**first, "prompt": "so so", "jobs": 2, "load_s": 0.0, "read_bytes": 0}
    assert done.returncode == 1
    assert done.stderr.count("the sky is green") == 1
    assert not (tmp_path / "here" / "3").exists()


@pytest.mark.sample(1)
@pytest.mark.parametrize("slow", [1, 0])
def test_torchrun_is_ended(tmp_path, slow):
    """torchrun passes SIGTERM on. Rank 0 waits for another rank or works itself, and records the interruption."""
    driver, pids = started(tmp_path, TORCHRUN, slow)
    driver.terminate()
    driver.wait(40)
    assert gone(pids)
    (record,) = records(tmp_path)
    assert record["status"] == "interrupted", record
    assert record["error"]["message"] == "interrupted by SIGTERM"


def test_torchrun_of_another_size_is_refused_once(tmp_path):
    done = torchrun(tmp_path, "parallel=ulysses4", "device=cpu")
    assert done.stderr.count("= 4 ranks, and torchrun started 2") == 1
    assert "(exitcode: 2) local_rank: 0" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_torchrun_lets_its_ranks_go(tmp_path):
    """There is nothing to draw."""
    done = torchrun(tmp_path, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("hydrarun runs diffusion transformers") == 1


@pytest.mark.parametrize(
    ("overrides", "size", "local", "text"),
    [
        (["parallel=ulysses4"], 2, 2, "ulysses 4 x tensor 1 = 4 ranks, and torchrun started 2: use --nproc_per_node 4, "
         "or parallel.ulysses_degree=2"),
        (["parallel=none"], 2, 2, "tensor 1 = 1 rank, and torchrun started 2: use --nproc_per_node 1, "
         "or parallel.ulysses_degree=2"),
        (["parallel=ulysses2"], 1, 1, "= 2 ranks, and torchrun started 1: use --nproc_per_node 2, "
         "or parallel.ulysses_degree=1"),
        (["parallel=hsdp2"], 3, 3, "= 1 rank, with hsdp 2 and vae 1: 2 ranks, and torchrun started 3: "
         "use --nproc_per_node 2"),
        (["parallel=ulysses2", "parallel.max_ranks=4"], 2, 2, "parallel.max_ranks: torchrun starts the ranks, so it has"
         " no effect"),
        (["parallel=ulysses4"], 16, 8, "and torchrun started 16: use --nproc_per_node 2, "
         "or parallel.ulysses_degree=16"),
    ],
)  # fmt: skip
def test_the_wrong_number_of_ranks(monkeypatch, overrides, size, local, text):
    for name, value in {"RANK": 0, "WORLD_SIZE": size, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": local}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UsageError) as raised:
        launch.check_rank_count(compose_config(overrides))
    assert text in str(raised.value)


@pytest.mark.parametrize(
    ("overrides", "cuda", "text"),
    [
        (["parallel.hsdp_degree=1000", "device=cpu"], 0, "= 1 rank, with hsdp 1000 and vae 1: 1000 ranks, and this"
         " machine starts 8 at most (one per core, or 8): use smaller degrees, or parallel.max_ranks=1000"),
        (["parallel.ring_degree=3", "parallel.ulysses_degree=3"], 0, "= 9 ranks, and this machine starts 8 at most"),
        (["parallel=ulysses4"], 2, "= 4 ranks, and this machine has 2 CUDA devices: use smaller"),
        (["parallel=ulysses2", "device=cuda"], 1, "= 2 ranks, and this machine has 1 CUDA device: use smaller"),
        (["parallel=ulysses4", "parallel.max_ranks=3"], 0, "= 4 ranks, above parallel.max_ranks=3: use smaller"),
        (["parallel=ulysses8", "device=cpu"], 1, None),
        (["parallel=usp2x4", "parallel.data_degree=2", "sampling.seed=[1,2]", "parallel.max_ranks=16"], 2, None),
        ([], 0, None),
    ],
)  # fmt: skip
def test_no_file_starts_any_number_of_ranks(monkeypatch, overrides, cuda, text):
    monkeypatch.setattr(launch.limits, "count_nvidia_devices", lambda: cuda)
    monkeypatch.setattr(launch.limits, "count_cores", lambda: 2)
    monkeypatch.setattr(local_group, "RankGroup", lambda size: pytest.fail("ranks were started"))
    config = compose_config(overrides)
    if text is None:
        launch.check_rank_count(config)
        return
    for start in (lambda: launch.run_configuration(config, Path("nowhere")), lambda: launch.load_runner(config)):
        with pytest.raises(UsageError) as raised:
            start()
        assert text in str(raised.value)


def test_only_the_command_line_sets_the_limit(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "parallel").mkdir()
    (tmp_path / "parallel" / "many.yaml").write_text("ulysses_degree: 9\nmax_ranks: 9\n")
    assert main.main(["parallel=many", "--config-dir", "."]) == 2
    assert (
        capsys.readouterr().err
        == "parallel.max_ranks: set in the file of an option; only the command line may set it\n"
    )
    assert main.main(["parallel=many", "parallel.max_ranks=8", "--config-dir", "."]) == 2
    assert "= 9 ranks, above parallel.max_ranks=8: " in capsys.readouterr().err
    assert main.main(["parallel.max_ranks=0"]) == 2
    assert capsys.readouterr().err == "parallel.max_ranks (command line): 0 is below 1.\n"


@pytest.fixture
def devices(monkeypatch):
    """Makes torch see that many CUDA devices."""

    def see(count: int) -> None:
        monkeypatch.setattr("torch.cuda.is_available", lambda: count > 0)
        monkeypatch.setattr("torch.cuda.device_count", lambda: count)

    return see


@pytest.mark.parametrize(
    ("name", "count", "expected"),
    [("cpu", 2, "cpu"), ("auto", 0, "cpu"), ("auto", 2, "cuda:1"), ("cuda", 4, "cuda:1"), ("cuda:0", 2, "cuda:1")],
)
def test_each_rank_has_its_device(devices, name, count, expected):
    devices(count)
    assert worker.choose_rank_device(name, RankInfo(1, 2, 1, 2)) == expected


@pytest.mark.parametrize(
    ("name", "count", "text"),
    [
        ("cuda:1", 2, "device=cuda:1: each of 2 ranks has a device of its own; use device=cuda"),
        ("cuda", 0, "device=cuda: 2 ranks on this machine need as many CUDA devices, and torch sees 0; "),
        ("auto", 1, "device=auto: 2 ranks on this machine need as many CUDA devices, and torch sees 1; "),
    ],
)
def test_too_few_devices_are_the_users_to_know(devices, name, count, text):
    devices(count)
    with pytest.raises(UsageError) as raised:
        worker.choose_rank_device(name, RankInfo(0, 2, 0, 2))
    assert str(raised.value).startswith(text)


def test_no_rank_imports_hydra():
    """Checks a rank's imports, and the checks of a configuration, which come closest to Hydra."""
    modules = (
        "hydrarun.engine.ranks.worker, hydrarun.config.checks.values, hydrarun.config.targets, hydrarun.outputs.writer"
    )
    script = f"import sys, {modules}; sys.exit('hydra' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], env=environment()).returncode == 0


def test_several_ranks_get_the_configuration_and_the_directory(fake, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr("hydrarun.engine.ranks.launch.RanksExecutor.run_job", lambda self, *job: seen.append(job))
    assert main.main(["parallel=ulysses2", "sampling.seed=3", "hydra.run.dir=here"]) == 0
    [(action, config, arguments)] = seen
    assert (action, arguments) == ("run", {"output_dir": str(tmp_path / "here")})
    assert (config["sampling"]["seed"], config["parallel"]["ulysses_degree"]) == (3, 2)


def test_a_rank_of_torchrun_serves_and_reads_no_configuration(monkeypatch):
    served = []
    monkeypatch.setattr(__main__, "serve_torchrun", served.append)
    monkeypatch.setattr("hydrarun.cli.main.main", lambda: 7)
    monkeypatch.setattr(sys, "argv", ["hydrarun", "x=1"])
    monkeypatch.setenv("WORLD_SIZE", "6")
    monkeypatch.setenv("LOCAL_RANK", "0")
    for rank, code in (("0", 7), ("1", 0), ("5", 0)):
        monkeypatch.setenv("RANK", rank)
        assert __main__.main() == code
    assert served == [["x=1"], ["x=1"]]


def test_pictures_of_ranks_are_those_of_one_process():
    sampling = {"num_inference_steps": 3, "seed": [4, 5]}
    remote = hydrarun.load(*TWO)
    (first, second) = remote.generate(**sampling)
    with pytest.raises(UsageError) as raised:
        remote.generate(sede=1)
    assert str(raised.value) == "sampling has no field 'sede'. Did you mean 'seed'?"
    remote.close()
    alone = hydrarun.load("device=cpu").generate(**sampling)
    for ours, theirs in zip((first, second), alone, strict=True):
        assert (ours.prompt, ours.seed) == (theirs.prompt, theirs.seed)
        assert np.abs(ours.pixels.astype(int) - theirs.pixels).max() <= 1
