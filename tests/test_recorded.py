"""Reading what a finished file says about its run: a stranger's file can say anything."""

import json
from pathlib import Path

import numpy as np
import pytest

from hydrarun import recorded
from hydrarun.errors import UsageError
from hydrarun.media import png
from hydrarun.outputs import OutputWriter

CONFIG = {
    "model": {"name": "demo", "path": "package:demo", "scheduler": None},
    "sampling": {
        "prompt": ["a", "b"],
        "negative_prompt": None,
        "num_inference_steps": 4,
        "true_cfg_scale": 1.0,
        "seed": [3, 4],
        "num_images_per_prompt": None,
    },
    "output": {"metadata": True},
}
FACTS = {
    "weights": {"path": "package:demo", "revision": None},
    "device": "cpu",
    "scheduler": "Euler",
    "versions": {"hydrarun": "0.1.0"},
}
PICTURES = np.random.default_rng(0).integers(0, 256, (2, 16, 24, 3), dtype=np.uint8)


@pytest.fixture
def run(tmp_path) -> Path:
    """The directory of a run of two pictures."""
    writer = OutputWriter(tmp_path / "run", CONFIG, FACTS, metadata=True)
    for pixels, prompt, seed in zip(PICTURES, "ab", (3, 4), strict=True):
        writer.save(pixels, prompt, None, seed, {"load_s": 1.0})
    writer.finish({}, {})
    return tmp_path / "run"


def second(run: Path) -> Path:
    return sorted(run.glob("0001-*.png"))[0]


def edit(path: Path, change) -> None:
    """Let `change` alter the record inside a PNG or a run.json."""
    if path.suffix == ".json":
        record = json.loads(path.read_text())
        change(record)
        path.write_text(json.dumps(record))
    else:
        pixels, record = png.read(path)
        change(record)
        path.write_bytes(png.encode(pixels, {"hydrarun": json.dumps(record)}))


def refused(path: Path) -> str:
    with pytest.raises(UsageError) as caught:
        recorded.load(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_picture_gives_the_configuration_of_its_whole_run(run):
    found = recorded.load(second(run))
    assert found.config == CONFIG
    assert found.facts == {key: FACTS.get(key) for key in recorded.FACTS}
    (picture,) = found.pictures
    assert picture.index == 1
    assert np.array_equal(picture.pixels, PICTURES[1])


def test_run_json_gives_every_picture(run):
    found = recorded.load(run / "run.json")
    assert found.config == CONFIG
    assert [picture.index for picture in found.pictures] == [0, 1]
    assert np.array_equal([picture.pixels for picture in found.pictures], PICTURES)


def test_a_picture_keeps_its_hash_when_its_pixels_were_changed(run):
    path = second(run)
    pixels, record = png.read(path)
    path.write_bytes(png.encode(pixels // 2, {"hydrarun": json.dumps(record)}))
    (picture,) = recorded.load(path).pictures
    assert picture.pixels is None
    assert picture.pixels_sha256 == record["pixels_sha256"]


def test_run_json_without_its_pictures_still_has_their_hashes(run):
    second(run).unlink()
    first, gone = recorded.load(run / "run.json").pictures
    assert first.pixels is not None
    assert gone.pixels is None
    assert len(gone.pixels_sha256) == 64


def test_a_picture_without_metadata_is_refused(tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(png.encode(PICTURES[0], {}))
    assert "output.metadata=false" in refused(path)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "[" * 100_000])
def test_a_json_file_that_is_no_record(tmp_path, text):
    path = tmp_path / "run.json"
    path.write_text(text)
    refused(path)


def test_missing_and_oversized_json_files(tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    assert "No such file" in refused(path)
    path.write_text("{}")
    monkeypatch.setattr(recorded, "MAX_JSON_BYTES", 1)
    assert "larger than" in refused(path)


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "a/b.png", "..", ""])
def test_listed_files_must_lie_beside_run_json(run, name):
    edit(run / "run.json", lambda record: record["outputs"][0].update(path=name))
    assert "not the name of a file beside it" in refused(run / "run.json")


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.update(format=2),
        lambda record: record.pop("format"),
        lambda record: record.pop("config"),
        lambda record: record.update(config=[1]),
        lambda record: record["config"].pop("sampling"),
        lambda record: record["config"].update(sampling="x"),
        lambda record: record.pop("batch"),
        lambda record: record["batch"].update(index="1"),
        lambda record: record["batch"].update(index=True),
        lambda record: record["batch"]["sampling"].update(height=1),
        lambda record: record["batch"].update(sampling=None),
        lambda record: record.pop("pixels_sha256"),
        lambda record: record.update(pixels_sha256=5),
    ],
)
def test_a_damaged_record_in_a_picture(run, change):
    edit(second(run), change)
    assert refused(second(run)).startswith(str(second(run)))


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.update(format="1"),
        lambda record: record.pop("outputs"),
        lambda record: record.update(outputs=[]),
        lambda record: record.update(outputs=[5]),
        lambda record: record.update(outputs={}),
        lambda record: record["outputs"][0].pop("pixels_sha256"),
        lambda record: record.pop("config"),
    ],
)
def test_a_damaged_run_json(run, change):
    edit(run / "run.json", change)
    assert refused(run / "run.json").startswith(str(run / "run.json"))
