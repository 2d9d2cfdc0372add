"""Videos: files, names, metadata and records."""

import hashlib
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from hydrarun.core.errors import RunError
from hydrarun.outputs.media import frames, mp4, png
from hydrarun.outputs.media.read import read_output
from hydrarun.outputs.provenance import hash_config
from hydrarun.outputs.writer import OutputWriter
from tests.outputs.test_writer import CONFIG, FACTS, VIDEO, save, writer, written


def video_writer(folder: Path, kind: str, metadata: bool = True) -> OutputWriter:
    config = {**CONFIG, "output": {"metadata": metadata, "format": kind, "fps": 16}}
    return writer(folder, config, metadata)


def test_an_mp4_is_written_under_its_name_and_recorded(tmp_path):
    record = save(video_writer(tmp_path, "mp4"), pixels=VIDEO)
    path = tmp_path / "run" / record["path"]
    assert record["path"] == f"0000-a-red-circle-7-{hash_config(CONFIG)}.mp4"
    assert written(tmp_path) == [record["path"]]
    assert record["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert record["pixels_sha256"] == hashlib.sha256(VIDEO.tobytes()).hexdigest()
    assert [record[key] for key in ("width", "height", "frames", "fps")] == [48, 32, 5, 16]
    pixels, recipe = mp4.read_mp4(path)
    assert pixels.shape == VIDEO.shape
    assert recipe["pixels_sha256"] == record["pixels_sha256"]
    assert {key: recipe[key] for key in FACTS} == FACTS
    with av.open(str(path)) as container:
        assert container.metadata["description"].endswith(
            "Size: 48x32, Frames: 5, FPS: 16, Model: demo, Version: hydrarun 0.1.0"
        )


def test_frames_are_written_into_a_folder_and_recorded(tmp_path):
    record = save(video_writer(tmp_path, "frames"), pixels=VIDEO)
    folder = tmp_path / "run" / record["path"]
    assert record["path"] == f"0000-a-red-circle-7-{hash_config(CONFIG)}"
    assert written(tmp_path) == [record["path"]]
    assert "sha256" not in record
    assert record["pixels_sha256"] == hashlib.sha256(VIDEO.tobytes()).hexdigest()
    assert [record[key] for key in ("width", "height", "frames", "fps")] == [48, 32, 5, 16]
    assert np.array_equal(frames.read_frames(folder)[0], VIDEO)


def test_every_frame_carries_the_recipe_and_its_own_hash(tmp_path):
    record = save(video_writer(tmp_path, "frames"), pixels=VIDEO)
    for number in range(5):
        path = tmp_path / "run" / record["path"] / f"frame-0000{number}.png"
        recipe = png.read_png(path)[1]
        assert recipe["frame"] == number
        assert recipe["frame_sha256"] == hashlib.sha256(VIDEO[number].tobytes()).hexdigest()
        assert recipe["pixels_sha256"] == record["pixels_sha256"]
        with Image.open(path) as image:
            assert image.text["parameters"].startswith("a red circle\nSteps: 24, ")


def test_videos_without_metadata(tmp_path):
    for kind in ("mp4", "frames"):
        record = save(video_writer(tmp_path / kind, kind, metadata=False), pixels=VIDEO)
        path = tmp_path / kind / "run" / record["path"]
        assert read_output(path)[1] is None


def test_a_video_without_latin_letters_in_its_prompt(tmp_path):
    assert save(video_writer(tmp_path, "mp4"), prompt="一只猫", pixels=VIDEO)["path"].startswith("0000-video-7-")
    assert save(writer(tmp_path / "b"), prompt="一只猫")["path"].startswith("0000-picture-7-")


@pytest.mark.parametrize("kind", ["mp4", "frames"])
def test_a_video_of_one_colour_is_an_error_and_no_file(tmp_path, kind):
    target = video_writer(tmp_path, kind)
    with pytest.raises(RunError, match="the video for seed 7 .* is all black"):
        save(target, pixels=np.zeros_like(VIDEO))
    with pytest.raises(RunError, match=r"is all one colour, RGB \(9, 90, 200\)"):
        save(target, pixels=np.broadcast_to(np.array([9, 90, 200], np.uint8), VIDEO.shape))
    assert written(tmp_path) == []
    black_start = VIDEO.copy()
    black_start[0] = 0
    assert save(target, pixels=black_start)["index"] == 2


def test_a_video_that_its_format_cannot_hold_is_an_error_and_no_file(tmp_path):
    target = video_writer(tmp_path, "mp4")
    with pytest.raises(RunError, match="not 47x32"):
        save(target, pixels=VIDEO[:, :, :47])
    assert written(tmp_path) == []
    assert target.outputs == []
    assert save(target, pixels=VIDEO)["index"] == 1
