"""Comparing a video, or one frame of it, with its replay, and the messages about both and about input images."""

import re
from pathlib import Path

import numpy as np
import pytest

from hydrarun.cli.commands import replay
from hydrarun.core.errors import UsageError
from hydrarun.outputs import reader
from hydrarun.outputs.media.read import read_output
from tests.cli.commands.test_replay import written


@pytest.fixture
def video() -> np.ndarray:
    """Smooth frames `[3, 32, 32, 3]`, which a lossy file keeps almost unchanged."""
    x = np.linspace(20, 200, 32)
    plane = (x + x[:, None]) / 2
    return np.stack([np.stack([plane + k, plane, plane - k], -1) for k in (0, 9, 18)]).astype(np.uint8)


def replayed(old: Path, new: np.ndarray, folder: Path, kind: str) -> bool:
    """Return whether `old` is identical to its replay `new`, written as `kind`."""
    (picture,) = reader.load_recorded_run(old).pictures
    return replay.compare_picture(picture, written(new, folder, kind), folder)


def path_of(pixels: np.ndarray, folder: Path, kind: str) -> Path:
    """Return the file or folder of frames, with embedded recipe, that a run writes into `folder`."""
    return folder / written(pixels, folder, kind, metadata=True)["outputs"][0]["path"]


@pytest.mark.parametrize("kind", ["mp4", "frames"])
@pytest.mark.parametrize("again", ["mp4", "frames"])
def test_a_video_is_compared_by_the_pixels_before_encoding(video, tmp_path, capsys, kind, again):
    path = path_of(video, tmp_path / "old", kind)
    assert replayed(path, video, tmp_path / "new", again)
    assert capsys.readouterr().out == f"{path.name}: identical pixels\n"


def test_the_distance_of_frames_is_exact(video, tmp_path, capsys):
    path = path_of(video, tmp_path / "old", "frames")
    changed = video.copy()
    changed[2, 0, 0, 0] += 4
    # mean squared error 16/9216: 10 log10(255^2 * 576)
    assert not replayed(path, changed, tmp_path / "new", "frames")
    assert capsys.readouterr().out == f"{path.name}: different pixels, largest difference 4 of 255, PSNR 75.7 dB\n"


@pytest.mark.parametrize(("kind", "again"), [("mp4", "mp4"), ("mp4", "frames"), ("frames", "mp4")])
def test_a_distance_to_a_lossy_file_is_said_to_be_one(video, tmp_path, capsys, kind, again):
    path = path_of(video, tmp_path / "old", kind)
    assert not replayed(path, video + np.uint8(20), tmp_path / "new", again)
    said = re.fullmatch(
        r"(\S+): different pixels, largest difference (\d+) of 255, PSNR ([\d.]+) dB \(as decoded from mp4, which is "
        r"lossy\)\n",
        capsys.readouterr().out,
    )
    assert said[1] == path.name
    assert 20 <= int(said[2]) <= 28
    assert float(said[3]) == pytest.approx(22.1, abs=1)  # 20 log10(255 / 20)


def test_what_is_lost_in_lossy_files_is_no_distance(tmp_path, capsys):
    folder = tmp_path / "new"
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    record = written(pixels, folder, "mp4")
    decoded = read_output(folder / record["outputs"][0]["path"])[0]
    assert not replay.compare_picture(reader.RecordedPicture("old.mp4", 0, "?", decoded, lossy=True), record, folder)
    assert capsys.readouterr().out == (
        "old.mp4: different pixels, too little to be measured (as decoded from mp4, which is lossy)\n"
    )


def test_another_number_of_frames_is_said(video, tmp_path, capsys):
    assert not replayed(path_of(video, tmp_path / "old", "frames"), video[:2], tmp_path / "new", "frames")
    assert "3 frames of 32x32 then, 2 frames of 32x32 now" in capsys.readouterr().out


def test_one_frame_is_compared_alone(video, tmp_path, capsys):
    path = path_of(video, tmp_path / "old", "frames") / "frame-00001.png"
    changed = video.copy()
    changed[0, 0, 0, 0] += 4
    assert replayed(path, changed, tmp_path / "new", "frames")
    changed[1, 0, 0, 0] += 4
    assert not replayed(path, changed, tmp_path / "newer", "frames")
    assert capsys.readouterr().out == (
        "frame-00001.png: identical pixels\n"
        "frame-00001.png: different pixels, largest difference 4 of 255, PSNR 71.0 dB\n"
    )


def test_one_frame_is_not_compared_with_a_lossy_video(video, tmp_path):
    found = reader.load_recorded_run(path_of(video, tmp_path, "frames") / "frame-00001.png")
    replay.check_frames(found, "frames")
    with pytest.raises(UsageError, match="frame-00001.png: one frame of a video; .* output.format=frames, not mp4"):
        replay.check_frames(found, "mp4")


def test_a_frame_beyond_the_redrawn_ones(video, tmp_path):
    path = path_of(video, tmp_path / "old", "frames") / "frame-00002.png"
    with pytest.raises(UsageError, match="frame-00002.png: No such file"):
        replayed(path, video[:2], tmp_path / "new", "frames")


def test_a_video_is_not_overwritten_by_its_replay(tmp_path):
    folder = tmp_path / "0000-a-1-0123abcd"
    folder.mkdir()
    for file in (folder, folder / "frame-00000.png"):
        assert replay.split_words([str(file), f"hydra.run.dir={tmp_path / 'again'}"])[0] == file
        with pytest.raises(UsageError, match=f"{file.name} itself is there and would be overwritten"):
            replay.split_words([str(file), f"hydra.run.dir={tmp_path}"])


def test_other_input_images_are_a_difference():
    then = {"path": "/data/a.png", "sha256": "ab", "width": 64, "height": 48}
    now = {**then, "path": "/elsewhere/a.png", "sha256": "cd"}
    assert list(replay.list_differences({"inputs": [then, then]}, {"inputs": [then, now]})) == [
        "  inputs[1].path: /data/a.png then, /elsewhere/a.png now",
        "  inputs[1].sha256: ab then, cd now",
    ]
    assert list(replay.list_differences({"inputs": None}, {"inputs": []})) == []


def test_the_description_says_what_will_be_read_and_drawn():
    config = {
        "model": {"name": "wan", "path": "owner/wan", "revision": "abc", "takes": ["num_frames"]},
        "sampling": {"width": 832, "height": 480, "num_frames": 81, "num_inference_steps": 40},
        "output": {"format": "mp4", "fps": 16},
        "input": {"images": ["/data/a.png", "/data/b.png"]},
    }
    assert list(replay.describe_config(config)) == [
        "replaying wan from owner/wan at abc: 832x480, 81 frames at 16 fps, 40 steps",
        "  input image /data/a.png",
        "  input image /data/b.png",
    ]
    config["sampling"].update(width=None)
    config["model"].update(takes=[])
    config.update(output={"format": "png", "fps": None}, input={"images": None})
    assert list(replay.describe_config(config)) == [
        "replaying wan from owner/wan at abc: the size of the input image, 40 steps"
    ]
    config["sampling"].update(layers=3)
    config["model"].update(takes=["layers"])
    (line,) = replay.describe_config(config)
    assert line == "replaying wan from owner/wan at abc: the size of the input image, 3 layers, 40 steps"
