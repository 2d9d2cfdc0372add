"""`recipe verify` runs a recipe, compares it with its evidence and writes the result; the rest of the file is kept."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from hydrarun.cli import main
from hydrarun.cli.recipe import evidence, pixel_digest, verify
from hydrarun.config.compose import compose_config
from hydrarun.config.recipes import file, search
from hydrarun.config.recipes.metadata import CHANGED, FORMAT, Evidence
from hydrarun.core.errors import RunError, UsageError
from hydrarun.engine.ranks import launch
from tests.helpers.paths import ROOT
from tests.helpers.undrawn import FINGERPRINT, TIMINGS, draw

HEAD = "# mine: do not touch\nsampling:  # odd   spacing\n    seed: 4\n    num_inference_steps: 3\n"


class Runs(list):
    """The configurations that were run, with their folders; `more` changes the results of the runs."""

    def __init__(self) -> None:
        super().__init__()
        self.more: dict = {}


@pytest.fixture
def runs(monkeypatch, tmp_path) -> Runs:
    """Replace runs by fake ones. The recipe `r.yaml` in the current folder has no evidence."""
    seen = Runs()

    def run(config, folder):
        seen.append((config, folder))
        if error := seen.more.get("error"):
            raise error
        return draw(config, folder, **seen.more)

    monkeypatch.setattr(launch, "run_configuration", run)
    monkeypatch.setattr(verify, "check_weights", lambda config, old: None)
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(HEAD)
    return seen


def recipe() -> file.Recipe:
    return search.load_recipe("r.yaml")


def verified(*words: str) -> int:
    return main.main(["recipe", "verify", "r.yaml", *words])


def test_one_without_evidence_is_run_twice_and_gets_it(runs, capsys):
    assert verified("hydra.run.dir=here") == 0
    assert [str(folder) for _, folder in runs] == ["here/first", "here/second"]
    found = recipe()
    assert found.status == "verified"
    assert found.text.startswith(HEAD + "\n" + file.MARK)
    assert [one.result for one in found.evidence.verified.outputs] == ["identical"]
    assert found.evidence.measured.sample == "r.webp"
    assert Path("r.webp").read_bytes()[8:12] == b"WEBP"
    said = capsys.readouterr()
    assert "output 0: identical\n" in said.out
    assert said.out.endswith("r.yaml: verified\n")
    assert "draws    1 picture, 128x128, 3 steps" in said.err
    assert compose_config(["recipe=r.yaml"]) == compose_config(["sampling.seed=4", "sampling.num_inference_steps=3"])


def test_with_evidence_it_is_run_once_and_the_evidence_stays(runs):
    verified()
    before = recipe().evidence.measured
    for shift, code in ((90, 1), (0, 0)):
        runs.more = {"shift": shift}
        assert verified() == code
        assert recipe().evidence.measured == before
    assert len(runs) == 4


def test_a_thumbnail_that_is_somebody_elses_is_left(runs):
    Path("r.webp").write_bytes(b"mine")
    assert verified() == 0
    assert recipe().evidence.measured.sample is None
    assert Path("r.webp").read_bytes() == b"mine"


def test_a_change_by_hand_begins_anew(runs):
    verified()
    Path("r.yaml").write_text(recipe().text.replace("seed: 4", "seed: 5"))
    assert recipe().status == CHANGED
    assert verified() == 0
    assert len(runs) == 4
    assert recipe().evidence.measured.outputs[0].seed == 5


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    ("more", "code", "status", "result", "said"),
    [
        ({"shift": 1}, 1, "broken", "near", "not identical, though hardware and versions are the evidence's"),
        ({"shift": 1, "dtype": "bfloat16"}, 0, "verified", "near", "within 1.5 times"),
        ({"shift": 1, "hardware": {"cpu": "other"}}, 0, "verified", "near", "times are not compared"),
        ({"shift": 90, "dtype": "bfloat16"}, 1, "broken", "different", "1 of 1 outputs are different"),
        ({"timings": {**TIMINGS, "total_s": 3.1}}, 1, "unverified", "identical", "more than 1.5 times as long as"),
        ({"timings": {**TIMINGS, "steps_s": [0, 0.3]}}, 1, "unverified", "identical", "more than 1.5 times as long as"),
        ({"timings": {**TIMINGS, "total_s": 0.1}}, 0, "verified", "identical", "within 1.5 times"),
        ({"timings": {**TIMINGS, "total_s": 99}, "hardware": {"cpu": "other"}}, 0, "verified", "identical", "other ha"),
    ],
)  # fmt: skip
def test_what_is_found_sets_the_status(more, code, status, result, said, runs, capsys):
    verified()
    runs.more = more
    assert verified() == code
    found = recipe().evidence
    assert (recipe().status, found.verified.outputs[0].result) == (status, result)
    assert any(said in sentence for sentence in found.verified.found)
    assert said in capsys.readouterr().out


def test_a_recipe_that_fails_is_broken_and_says_why(runs):
    runs.more = {"error": RunError("NaN in the picture of ~/x")}
    assert verified() == 1
    assert recipe().status == "broken"
    assert recipe().evidence.verified.found == ["NaN in the picture of ~/x"]
    assert recipe().evidence.measured is None
    runs.more = {}
    assert verified() == 0


@pytest.mark.parametrize("error", [UsageError("no CUDA here"), KeyboardInterrupt(), ValueError("a bug")])
def test_what_is_not_the_recipes_fault_leaves_it_alone(error, runs):
    runs.more = {"error": error}
    assert verified() == {UsageError: 2, KeyboardInterrupt: 130, ValueError: 1}[type(error)]
    assert Path("r.yaml").read_text() == HEAD


def test_a_recipe_that_was_changed_while_it_ran_is_left_alone(runs, monkeypatch, capsys):
    run = launch.run_configuration
    monkeypatch.setattr(
        launch, "run_configuration", lambda *job: Path("r.yaml").write_text("device: cpu\n") and run(*job)
    )
    assert verified() == 1
    assert "was changed while it ran" in capsys.readouterr().err
    assert Path("r.yaml").read_text() == "device: cpu\n"


def test_what_cannot_be_written_is_printed(runs, monkeypatch, capsys):
    monkeypatch.setattr(
        file, "write_evidence", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied"))
    )
    assert verified() == 0
    shown = capsys.readouterr().out
    assert "r.yaml: verified, but it cannot be written here (Permission denied). The evidence:" in shown
    assert f"\n{file.MARK}\nevidence:\n  format: 1\n  status: verified\n" in shown


@pytest.mark.parametrize(
    "word", ["sampling.seed=5", "dtype=bfloat16", "cache=none", "recipe=x", "model.name=x", "warmup=1"]
)
def test_only_where_it_runs_can_be_said(word, runs, capsys):
    assert verified(word) == 2
    assert f"{word}: a recipe is verified as it is." in capsys.readouterr().err
    assert not runs


def test_quality_is_measured_again(runs):
    quality = {"psnr": {"mean": 40.0}, "noise_floor": {"repeat": {"psnr": {"mean": 100.0}}}}
    runs.more = {"quality": {"twin": "/home/ann/x", **quality}}
    assert verified("report.metrics=[psnr]", "report.noise_floor=[repeat]") == 0
    assert recipe().evidence.measured.quality == quality
    for mean, code in ((39.6, 0), (39.4, 1)):
        runs.more = {"quality": {**quality, "psnr": {"mean": mean}}}
        assert verified() == code
    assert recipe().status == "broken"
    assert recipe().evidence.verified.found[0] == "psnr 39.4 on average, 40 in the evidence"
    assert runs[-1][0]["report"]["metrics"] == ["psnr"]
    assert runs[-1][0]["report"]["noise_floor"] == ["repeat"]


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ({"psnr": {"mean": 40}}, {"psnr": {"mean": 39.6}}, []),
        ({"psnr": {"mean": 40}}, {"psnr": {"mean": 39.4}}, ["psnr 39.4 on average, 40 in the evidence"]),
        ({"psnr": {"mean": 40}}, {"psnr": {"mean": 35}, "noise_floor": {"a": {"psnr": {"mean": 34}}}}, []),
        ({"ssim": {"mean": 0.99}}, {"ssim": {"mean": 0.98}}, ["ssim 0.98 on average, 0.99 in the evidence"]),
        ({"accuracy": {"outputs": 1.0}}, {"accuracy": {"outputs": 0.5}}, [
            "the judge finds 50% of the pictures right, 100% in the evidence"]),
        ({"psnr": {"mean": "high"}, "ssim": 5}, {"psnr": {"mean": 1}, "ssim": {"mean": 0}}, []),
        ({"psnr": {"mean": 40}}, {}, []),
    ],
)  # fmt: skip
def test_quality_may_differ_by_chance_and_not_more(old, new, found):
    assert list(evidence.list_quality_losses(old, new)) == found


def test_other_weights_are_no_verification(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text("device: cpu\n")
    config = compose_config(["recipe=r.yaml"])
    measured = evidence.measure_run(draw(config, tmp_path / "run"), tmp_path / "run", None)
    assert measured.weights.fingerprint == FINGERPRINT
    verify.check_weights(config, measured)
    other = replace(measured, weights=replace(measured.weights, fingerprint="f00"))
    file.write_evidence(recipe(), Evidence(FORMAT, "unverified", "", other))
    assert verified() == 1
    assert f"fingerprint f00 there, {FINGERPRINT}" in capsys.readouterr().err
    assert recipe().status == "unverified"


def test_nothing_is_downloaded_for_a_device_that_is_not_here(monkeypatch, capsys):
    monkeypatch.setattr(verify.hub, "resolve_weights", lambda model: pytest.fail("it looked for weights"))
    assert main.main(["recipe", "verify", "flux_schnell/rtx4090"]) == 2
    assert "device=cuda" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["{sampling: {seed: 1}}", "sampling: {seed: 1}\n..."])
def test_one_that_cannot_take_evidence_is_refused_before_it_runs(text, runs, capsys):
    Path("r.yaml").write_text(text)
    assert verified() == 2
    assert "cannot insert the evidence; write each section of the recipe on lines of its own" in capsys.readouterr().err
    assert not runs


def test_evidence_that_outgrows_a_recipe(runs, capsys):
    prompts = [f"a red circle {index}" for index in range(70)]
    Path("r.yaml").write_text(f"sampling: {{prompt: {prompts}}}\n")
    assert verified() == 2
    assert "the evidence of 70 outputs makes it larger than 64 KiB" in capsys.readouterr().err
    assert Path("r.yaml").read_text().startswith("sampling: {prompt")


def test_the_distance_of_fingerprints(runs):
    from tests.helpers.undrawn import noise

    picture = noise(1)
    assert (
        pixel_digest.compare_fingerprints(
            pixel_digest.compute_fingerprint(picture), pixel_digest.compute_fingerprint(picture)
        )
        == 100
    )
    assert (
        47
        < pixel_digest.compare_fingerprints(
            pixel_digest.compute_fingerprint(picture), pixel_digest.compute_fingerprint(picture // 2 * 2)
        )
        < 53
    )
    video = picture[None].repeat(5, 0)
    assert pixel_digest.compute_fingerprint(video) != pixel_digest.compute_fingerprint(picture)
    assert (
        pixel_digest.compare_fingerprints(
            pixel_digest.compute_fingerprint(video), pixel_digest.compute_fingerprint(picture)
        )
        == 0
    )
    for nonsense in ("", "?", "AAA", "é"):
        assert pixel_digest.compare_fingerprints(nonsense, pixel_digest.compute_fingerprint(picture)) == 0


def test_a_run_exported_here_is_verified_in_a_fresh_copy(tmp_path, monkeypatch, capsys):
    """The recipe file and a clone are enough for the same pixels, with real runs in another process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evidence, "SLOW", 1000)  # times are not tested here
    words = ["sampling.num_inference_steps=4", "sampling.prompt=a red circle, 1", "sampling.seed=7", "cache=every_n"]
    assert main.main([*words, "hydra.run.dir=run"]) == 0
    assert main.main(["recipe", "export", "run", "sent/r.yaml"]) == 0
    for name in ("hydrarun", "conf", "recipes", "weights"):
        shutil.copytree(ROOT / name, tmp_path / "clone" / name, ignore=shutil.ignore_patterns("__pycache__"))
    environment = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    code = "import sys; from hydrarun.cli.main import main; from hydrarun.cli.recipe import evidence; "
    code += "evidence.SLOW = 1000; sys.exit(main())"
    command = [sys.executable, "-c", code, "recipe", "verify", str(tmp_path / "sent" / "r.yaml")]
    done = subprocess.run(command, cwd=tmp_path / "clone", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "output 0: identical" in done.stdout
    assert search.load_recipe("sent/r.yaml").status == "verified"
