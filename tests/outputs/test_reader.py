"""Reading the metadata that an output file carries about its run, also from untrusted files."""

import json
from pathlib import Path

import numpy as np
import pytest

from hydrarun.core.errors import UsageError
from hydrarun.outputs import reader
from hydrarun.outputs.media import mp4, png
from hydrarun.outputs.writer import OutputWriter, hash_pixels

CONFIG = {
    "model": {"name": "demo", "path": "package:demo", "scheduler": None},
    "sampling": {
        "prompt": ["a", "b"],
        "negative_prompt": None,
        "num_inference_steps": 4,
        "true_cfg_scale": 1.0,
        "guidance_scale": None,
        "seed": [3, 4],
        "num_images_per_prompt": None,
    },
    "input": {"images": None},
    "output": {"metadata": True, "format": "png", "fps": None},
}
FACTS = {
    "weights": {"path": "package:demo", "revision": None},
    "inputs": [{"path": "/data/a.png", "sha256": "ab" * 32, "width": 64, "height": 48}],
    "device": "cpu",
    "scheduler": "Euler",
    "versions": {"hydrarun": "0.1.0"},
}
VIDEOS = np.random.default_rng(0).integers(0, 256, (2, 3, 16, 24, 3), dtype=np.uint8)
PICTURES = VIDEOS[:, 0]


def made(folder: Path, kind: str) -> Path:
    """Write a run folder with two pictures or videos."""
    config = {**CONFIG, "output": {"metadata": True, "format": kind, "fps": None if kind == "png" else 16}}
    writer = OutputWriter(folder, config, FACTS, metadata=True)
    for pixels, prompt, seed in zip(PICTURES if kind == "png" else VIDEOS, "ab", (3, 4), strict=True):
        writer.save(pixels, prompt, None, seed, {"load_s": 1.0})
    writer.finish({"timings": {}, "memory": {}})
    return folder


@pytest.fixture
def run(tmp_path) -> Path:
    return made(tmp_path / "run", "png")


def second(run: Path) -> Path:
    """Return the second picture, video or folder of frames."""
    return next(run.glob("0001-*"))


def edit(path: Path, change) -> None:
    """Apply `change` to the record inside a PNG or a run.json."""
    if path.suffix == ".json":
        record = json.loads(path.read_text())
        change(record)
        path.write_text(json.dumps(record))
    else:
        pixels, record = png.read_png(path)
        change(record)
        path.write_bytes(png.encode_png(pixels, {"hydrarun": json.dumps(record)}))


def refused(path: Path) -> str:
    with pytest.raises(UsageError) as caught:
        reader.load_recorded_run(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_picture_gives_the_configuration_of_its_whole_run(run):
    found = reader.load_recorded_run(second(run))
    assert found.config == CONFIG
    assert found.facts == {key: FACTS.get(key) for key in reader.FACTS}
    (picture,) = found.pictures
    assert picture.index == 1
    assert np.array_equal(picture.pixels, PICTURES[1])


def test_run_json_gives_every_picture(run):
    found = reader.load_recorded_run(run / "run.json")
    assert found.config == CONFIG
    assert [picture.index for picture in found.pictures] == [0, 1]
    assert np.array_equal([picture.pixels for picture in found.pictures], PICTURES)


def test_a_picture_keeps_its_hash_when_its_pixels_were_changed(run):
    path = second(run)
    pixels, record = png.read_png(path)
    path.write_bytes(png.encode_png(pixels // 2, {"hydrarun": json.dumps(record)}))
    (picture,) = reader.load_recorded_run(path).pictures
    assert picture.pixels is None
    assert picture.pixels_sha256 == record["pixels_sha256"]


def test_run_json_without_its_pictures_still_has_their_hashes(run):
    second(run).unlink()
    first, gone = reader.load_recorded_run(run / "run.json").pictures
    assert first.pixels is not None
    assert gone.pixels is None
    assert len(gone.pixels_sha256) == 64


def test_a_picture_without_metadata_is_refused(tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(png.encode_png(PICTURES[0], {}))
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
    monkeypatch.setattr(reader, "MAX_JSON_BYTES", 1)
    assert "larger than" in refused(path)


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "a/b.png", "..", ""])
def test_listed_files_must_lie_beside_run_json(run, name):
    edit(run / "run.json", lambda record: record["outputs"][0].update(path=name))
    assert "not the name of a file next to it" in refused(run / "run.json")


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


@pytest.mark.parametrize("path", [5, "../x", None])
def test_a_picture_is_named_by_its_file_not_by_its_record(run, path):
    edit(second(run), lambda record: record.update(path=path))
    assert reader.load_recorded_run(second(run)).pictures[0].name == second(run).name


def test_a_listed_name_too_long_for_a_file_is_a_file_that_is_gone(run):
    edit(run / "run.json", lambda record: record["outputs"][0].update(path="x" * 1000))
    assert reader.load_recorded_run(run / "run.json").pictures[0].pixels is None


# --- videos ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mp4", "frames"])
def test_a_video_gives_the_configuration_of_its_whole_run(tmp_path, kind):
    run = made(tmp_path, kind)
    found = reader.load_recorded_run(second(run))
    assert found.config == {**CONFIG, "output": {"metadata": True, "format": kind, "fps": 16}}
    assert found.facts["inputs"] == FACTS["inputs"]
    (video,) = found.pictures
    assert (video.name, video.index, video.part, video.lossy) == (second(run).name, 1, None, kind == "mp4")
    assert video.pixels_sha256 == hash_pixels(VIDEOS[1])
    assert video.pixels.shape == VIDEOS[1].shape
    assert np.array_equal(video.pixels, VIDEOS[1]) == (kind == "frames")


@pytest.mark.parametrize("kind", ["mp4", "frames"])
def test_run_json_gives_every_video(tmp_path, kind):
    found = reader.load_recorded_run(made(tmp_path, kind) / "run.json").pictures
    assert [(video.index, video.lossy) for video in found] == [(0, kind == "mp4"), (1, kind == "mp4")]
    assert [video.pixels_sha256 for video in found] == [hash_pixels(video) for video in VIDEOS]
    assert [video.pixels.shape for video in found] == [(3, 16, 24, 3)] * 2


def test_one_frame_of_a_folder(tmp_path):
    path = second(made(tmp_path, "frames")) / "frame-00002.png"
    (frame,) = reader.load_recorded_run(path).pictures
    assert (frame.name, frame.index, frame.part) == ("frame-00002.png", 1, "frame-00002.png")
    assert frame.pixels_sha256 == hash_pixels(VIDEOS[1, 2])
    assert np.array_equal(frame.pixels, VIDEOS[1, 2])


def test_a_folder_that_lost_a_frame_keeps_the_hash_of_all(tmp_path):
    folder = second(made(tmp_path, "frames"))
    (folder / "frame-00000.png").unlink()
    (video,) = reader.load_recorded_run(folder).pictures
    assert video.pixels is None
    assert video.pixels_sha256 == hash_pixels(VIDEOS[1])


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.update(frame="2"),
        lambda record: record.update(frame=True),
        lambda record: record.pop("frame_sha256"),
        lambda record: record.update(frame_sha256=None),
    ],
)
def test_a_damaged_record_in_a_frame(tmp_path, change):
    path = second(made(tmp_path, "frames")) / "frame-00002.png"
    edit(path, change)
    assert refused(path).startswith(f"{path}: 'frame")


def test_an_mp4_with_a_strangers_comment(tmp_path):
    path = tmp_path / "video.mp4"
    path.write_bytes(mp4.encode_mp4(VIDEOS[0], 16, {}))
    assert refused(path).startswith(f"{path}: holds no recipe: it was written with output.metadata=false")
    path.write_bytes(mp4.encode_mp4(VIDEOS[0], 16, {"hydrarun": '{"format": 1}'}))
    assert refused(path) == f"{path}: 'config' is missing or not a dict"


def test_a_folder_without_frames(tmp_path):
    assert "holds no frame-00000.png" in refused(tmp_path)
