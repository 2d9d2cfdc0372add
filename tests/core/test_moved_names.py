"""Files of version 0.1.0 contain the class names of that version."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from hydrarun.cli import main
from hydrarun.cli.commands import replay
from hydrarun.cli.main import dispatch_verb
from hydrarun.config.compose import compose_config, compose_unchecked
from hydrarun.config.targets import list_shipped_targets, load_class
from hydrarun.core.moved_names import read_moved_names, use_current_names, use_original_names
from hydrarun.outputs import reader
from hydrarun.outputs.media.read import read_output
from hydrarun.outputs.provenance import describe_hardware, hash_config
from tests.helpers import tiny
from tests.helpers.paths import DATA

FILES = DATA / "v0.1.0"
#: every class of this package that version 0.1.0 could build
OLD = (FILES / "targets.txt").read_text().split()


@pytest.mark.parametrize("name", OLD)
def test_every_class_of_version_0_1_0_is_found(name):
    today = use_current_names({"_target_": name})["_target_"]
    assert today in list_shipped_targets()
    assert load_class({"_target_": today}).__name__ == name.rpartition(".")[2]


def test_names_go_back_and_forth():
    assert len(set(read_moved_names().values())) == len(read_moved_names())
    config = {"a": [{"_target_": old} for old in OLD], "prompt": OLD[0], "b": {"_target_": "my.Own", "x": 1}}
    moved = use_current_names(config)
    assert use_original_names(moved) == config
    assert moved["prompt"] == OLD[0]
    assert moved["b"] == config["b"]


def test_a_hash_is_that_of_version_0_1_0():
    """The hash names a batch's files and its ledger; the value was recorded with that version."""
    assert hash_config(compose_unchecked(["sampling.prompt=x"])[0]) == "c5c0ca22"


def test_an_option_of_the_users_may_have_old_names(tmp_path):
    old = tmp_path / "cache" / "mine.yaml"
    old.parent.mkdir()
    old.write_text(
        "_target_: hydrarun.cache.step_cache.StepCache\n"
        "gate: {_target_: hydrarun.cache.gates.EveryN, n: 3, first: 1, last: 1}\n"
        "predictor: {_target_: hydrarun.cache.predictors.Reuse}\n"
    )
    config = compose_config([f"hydra.searchpath=[file://{tmp_path}]", "cache=mine"])
    assert config["cache"] == compose_config(["cache=every_n", "cache.gate.n=3"])["cache"]


@pytest.mark.parametrize("name", ["plain", "teacache"])
def test_a_picture_of_version_0_1_0_replays(name, tmp_path, capsys):
    """Identical on the hardware it was drawn on; elsewhere within 1 of 255, because kernels round differently."""
    file = FILES / f"{name}.png"
    then = reader.load_recorded_run(file)
    code = dispatch_verb(["replay", str(file), f"hydra.run.dir={tmp_path / 'again'}"])
    said = capsys.readouterr().out
    drawn = read_output(next((tmp_path / "again").glob("*.png")))[0]
    here = describe_hardware("cpu")
    if all(then.facts["hardware"][key] == here[key] for key in ("cpu", "cpu_capability", "torch_threads")):
        assert (code, f"{name}.png: identical pixels" in said) == (0, True)
    assert abs(drawn.astype(int) - read_output(file)[0].astype(int)).max() <= 1


def test_a_batch_that_version_0_1_0_began_is_gone_on_with(tmp_path, monkeypatch, capsys):
    """The run continues with its ledger and files: existing pictures are not drawn again, missing ones are."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(FILES / "batch", "run")
    Path("prompts.txt").write_text("a red circle\na blue square\n")
    gone = next(Path("run").glob("0001-*.png"))
    before = gone.read_bytes()
    gone.unlink()
    words = ["input.prompts=prompts.txt", "device=cpu", "sampling.num_inference_steps=2", "hydra.run.dir=run"]
    assert main.main(words) == 0
    said = capsys.readouterr().err
    assert "1 of 2 are there and verified, 1 to draw" in said
    again, first = (read_output(file)[0].astype(int) for file in (gone, _written(tmp_path, before)))
    assert abs(again - first).max() <= 1  # as above
    rows = Path("run", "ledger.jsonl").read_text().splitlines()
    assert rows[0] == (FILES / "batch" / "ledger.jsonl").read_text().splitlines()[0]


def _written(folder: Path, content: bytes) -> Path:
    file = folder / "before.png"
    file.write_bytes(content)
    return file


def test_a_recorded_configuration_has_names_of_today(tiny_folder):
    config = use_original_names(tiny.config(tiny_folder))
    del config["scheduler"]
    recorded = reader.RecordedRun(use_current_names(config), dict.fromkeys(reader.FACTS), [])
    assert replay.rebuild_config(recorded, []) == tiny.config(tiny_folder)
