"""Reference runs on disk: ordinary runs, reused only while nothing has changed."""

import copy
import json
import os
from pathlib import Path

import numpy as np
import pytest

from hydrarun.core.errors import RunError
from hydrarun.engine.runs import reference
from hydrarun.outputs import reader
from hydrarun.outputs.provenance import hash_config
from hydrarun.outputs.writer import OutputWriter, Picture
from tests.outputs.test_writer import CONFIG, FACTS, MEASURED, PIXELS, VIDEO

CACHED = {"_target_": "hydrarun.acceleration.cache.step_cache.StepCache", "gate": {"n": 2}}
PICTURES = [Picture(PIXELS, "a red circle", " ", 7), Picture(255 - PIXELS, "一只猫", " ", 8)]


def configuration(folder: Path, **changes) -> dict:
    model = {**CONFIG["model"], "takes": ["true_cfg_scale"]}
    report = {"metrics": ["psnr"], "noise_floor": ["repeat"], "twins": str(folder / "twins")}
    return {**CONFIG, "model": model, "cache": CACHED, "report": report, **changes}


def facts(folder: Path) -> dict:
    """Return the facts of a run's writer."""
    return OutputWriter(folder / "run", CONFIG, FACTS, metadata=True).facts


@pytest.fixture
def config(tmp_path) -> dict:
    """A configuration whose reference run is kept."""
    config = configuration(tmp_path)
    reference.save_reference(config, facts(tmp_path), PICTURES, MEASURED)
    return config


def test_the_twin_is_the_same_without_cache_and_measuring_and_loss(tmp_path):
    twin = reference.make_reference_config(
        configuration(tmp_path, output={"metadata": False, "format": "png", "fps": None})
    )
    assert twin["cache"] == {"_target_": "hydrarun.acceleration.cache.base.NoCache"}
    assert twin["output"] == {"metadata": True, "format": "png", "fps": None}
    assert twin["report"] == {"metrics": [], "noise_floor": [], "objectives": [], "twins": "outputs/twins"}
    assert twin["sampling"] == CONFIG["sampling"]
    assert twin["warmup"] == 0


def test_the_folder_is_named_by_the_twins_hash_whatever_the_cache_is_and_what_is_measured(config, tmp_path):
    place = reference.find_reference_dir(config)
    assert place == tmp_path / "twins" / hash_config(reference.make_reference_config(config))
    assert reference.find_reference_dir({**config, "cache": reference.make_no_cache_node()}) == place
    assert reference.find_reference_dir({**config, "report": {**config["report"], "metrics": []}}) == place
    other = {**config, "sampling": {**config["sampling"], "seed": 9}}
    assert reference.find_reference_dir(other).parent == place.parent
    assert reference.find_reference_dir(other) != place


def test_a_kept_twin_is_an_ordinary_run(config):
    record = json.loads((reference.find_reference_dir(config) / "run.json").read_text())
    assert record["status"] == "complete"
    assert record["config_hash"] == reference.find_reference_dir(config).name
    assert {key: record[key] for key in MEASURED if key != "timings"} == {
        "memory": MEASURED["memory"],
        "cache": MEASURED["cache"],
    }
    loaded = reader.load_recorded_run(reference.find_reference_dir(config) / "run.json")
    for have, want in zip(loaded.pictures, PICTURES, strict=True):
        assert np.array_equal(have.pixels, want.pixels)


def test_what_is_kept_comes_back_in_order_and_nothing_else_is_left(config, tmp_path):
    found = reference.read_reference(config, facts(tmp_path))
    assert [np.array_equal(have, want.pixels) for have, want in zip(found, PICTURES, strict=True)] == [True, True]
    assert os.listdir(tmp_path / "twins") == [reference.find_reference_dir(config).name]


def test_a_video_is_kept_as_frames_whatever_the_run_writes(tmp_path):
    output = {"metadata": False, "format": "mp4", "fps": 16}
    model = {**CONFIG["model"], "takes": ["num_frames"]}
    config = configuration(tmp_path, output=output, model=model)
    reference.save_reference(config, facts(tmp_path), [Picture(VIDEO, "a red circle", " ", 7)], MEASURED)
    (found,) = reference.read_reference(config, facts(tmp_path))
    assert np.array_equal(found, VIDEO)


def test_none_is_kept_yet(tmp_path):
    assert reference.read_reference(configuration(tmp_path), facts(tmp_path)) is None


@pytest.mark.parametrize(
    "key",
    [
        "versions",
        "hardware",
        "weights",
        "inputs",
        "device",
        "dtype",
        "attention",
        "scheduler",
        "compile",
        "quantization",
    ],
)
def test_one_that_was_made_otherwise_is_not_reused(config, tmp_path, key):
    now = copy.deepcopy(facts(tmp_path))
    if key == "hardware":
        now["hardware"]["torch_threads"] = 3
    else:
        now[key] = "another"
    assert reference.read_reference(config, now) is None


def rewrite(file: Path, **changes) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


DAMAGE = {
    "failed": lambda folder: rewrite(folder / "run.json", status="failed"),
    "another configuration of the same hash": lambda folder: rewrite(folder / "run.json", config=CONFIG),
    "no configuration": lambda folder: rewrite(folder / "run.json", config=[]),
    "another format": lambda folder: rewrite(folder / "run.json", format=0),
    "not JSON": lambda folder: (folder / "run.json").write_text("{"),
    "a list": lambda folder: (folder / "run.json").write_text("[]"),
    "other pixels": lambda folder: os.replace(*sorted(folder.glob("*.png"))),
    "a picture is gone": lambda folder: sorted(folder.glob("*.png"))[0].unlink(),
    "a damaged picture": lambda folder: sorted(folder.glob("*.png"))[0].write_bytes(b"\x89PNG"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_one_is_not_reused_and_replaced(config, tmp_path, name):
    DAMAGE[name](reference.find_reference_dir(config))
    assert reference.read_reference(config, facts(tmp_path)) is None
    reference.save_reference(config, facts(tmp_path), PICTURES, MEASURED)
    assert len(reference.read_reference(config, facts(tmp_path))) == 2
    assert os.listdir(tmp_path / "twins") == [reference.find_reference_dir(config).name]


def test_a_black_one_is_refused_and_leaves_the_older_one(config, tmp_path):
    black = Picture(np.zeros_like(PIXELS), "a red circle", " ", 7)
    with pytest.raises(RunError, match="^the reference run: the picture for seed 7 .* is all black"):
        reference.save_reference(config, facts(tmp_path), [PICTURES[0], black], MEASURED)
    assert len(reference.read_reference(config, facts(tmp_path))) == 2
    assert os.listdir(tmp_path / "twins") == [reference.find_reference_dir(config).name]


def test_a_folder_that_cannot_be_is_one_line(tmp_path):
    (tmp_path / "twins").write_text("a file")
    config = configuration(tmp_path)
    with pytest.raises(RunError) as caught:
        reference.save_reference(config, facts(tmp_path), PICTURES, MEASURED)
    assert str(caught.value) == (
        f"the reference run cannot be kept in {reference.find_reference_dir(config)}: File exists;"
        " choose another folder: report.twins=…"
    )


def test_two_runs_that_keep_the_same_twin_at_once_are_both_content(config, tmp_path, monkeypatch):
    """The other run's folder appears between our two renames."""
    replace = os.replace

    def raced(source, target):
        if Path(target) == reference.find_reference_dir(config):
            replace(Path(source).parent / "old", target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", raced)
    reference.save_reference(config, facts(tmp_path), PICTURES, MEASURED)
    assert len(reference.read_reference(config, facts(tmp_path))) == 2
