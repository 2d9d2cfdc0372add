"""A video as a folder of PNG files."""

from pathlib import Path

import numpy as np
import pytest

from hydrarun.core.errors import UsageError
from hydrarun.outputs.media import frames, png

PIXELS = np.random.default_rng(0).integers(0, 256, (4, 16, 24, 3), dtype=np.uint8)
TEXTS = [{"hydrarun": f'{{"frame": {number}}}'} for number in range(4)]


@pytest.fixture
def folder(tmp_path) -> Path:
    frames.write_frames(tmp_path / "video", PIXELS, TEXTS)
    return tmp_path / "video"


def refused(folder: Path) -> str:
    with pytest.raises(UsageError) as caught:
        frames.read_frames(folder)
    assert str(caught.value).startswith(str(folder))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_frames_come_back_with_the_first_ones_recipe(folder):
    pixels, record = frames.read_frames(folder)
    assert np.array_equal(pixels, PIXELS)
    assert pixels.dtype == np.uint8
    assert record == {"frame": 0}


def test_each_frame_is_a_picture_with_its_own_text(folder):
    assert sorted(path.name for path in folder.iterdir()) == [f"frame-0000{number}.png" for number in range(4)]
    pixels, record = png.read_png(folder / "frame-00002.png")
    assert np.array_equal(pixels, PIXELS[2])
    assert record == {"frame": 2}


def test_an_older_folder_is_replaced_whole(folder):
    frames.write_frames(folder, PIXELS[:2], TEXTS[:2])
    assert np.array_equal(frames.read_frames(folder)[0], PIXELS[:2])
    assert [path.name for path in folder.parent.iterdir()] == ["video"]


@pytest.mark.parametrize("older", [False, True])
def test_a_failure_leaves_what_was_there_and_no_litter(tmp_path, monkeypatch, older):
    if older:
        frames.write_frames(tmp_path / "video", PIXELS[:2], TEXTS[:2])

    def full(path: Path, data: bytes) -> None:
        if path.name == "frame-00002.png":
            raise OSError("disk full")
        path.write_bytes(data)

    monkeypatch.setattr(frames, "write_flushed", full)
    with pytest.raises(OSError, match="disk full"):
        frames.write_frames(tmp_path / "video", PIXELS, TEXTS)
    assert [path.name for path in tmp_path.iterdir()] == ["video"] * older
    if older:
        assert len(frames.read_frames(tmp_path / "video")[0]) == 2


def test_frames_are_read_by_number_and_other_files_are_not(folder):
    (folder / "frame-00003.png").rename(folder / "frame-100000.png")
    for stranger in ("a.png", "frame-1.png", "frame-00003.png.tmp", "frame-x.png"):
        (folder / stranger).write_bytes(b"no picture")
    assert np.array_equal(frames.read_frames(folder)[0], PIXELS)


def test_a_folder_without_frames(tmp_path):
    wanted = "holds no frame-00000.png and no layer-0.png: not a folder of frames or layers"
    assert refused(tmp_path) == f"{tmp_path}: {wanted}"


def test_no_such_folder(tmp_path):
    assert refused(tmp_path / "none") == f"{tmp_path / 'none'}: No such file or directory"


def test_a_damaged_frame(folder):
    path = folder / "frame-00001.png"
    path.write_bytes(path.read_bytes()[:-40])
    assert "frame-00001.png: damaged PNG file" in refused(folder)


def test_frames_of_two_sizes(folder):
    (folder / "frame-00001.png").write_bytes(png.encode_png(PIXELS[1, :8], {}))
    assert refused(folder) == f"{folder}: refused, its frames are not all of one size"


def test_too_many_bytes(folder, monkeypatch):
    monkeypatch.setattr(frames, "MAX_BYTES", PIXELS.nbytes)
    assert len(frames.read_frames(folder)[0]) == 4
    monkeypatch.setattr(frames, "MAX_BYTES", PIXELS.nbytes - 1)
    assert refused(folder) == f"{folder}: refused, more than {PIXELS.nbytes - 1} bytes of frames"
