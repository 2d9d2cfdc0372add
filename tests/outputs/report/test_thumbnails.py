"""The media that the page embeds, and the differences between outputs."""

from __future__ import annotations

import base64
import io
import math

import av
import numpy as np
import pytest
from PIL import Image

from hydrarun.outputs.media import frames, mp4, png
from hydrarun.outputs.quality.metrics import compare_outputs
from hydrarun.outputs.report import thumbnails
from hydrarun.outputs.report.collect import collect_points
from hydrarun.outputs.report.layout import arrange_grid
from tests.helpers import fake_sweep
from tests.helpers.fake_sweep import picture

NOISE = np.random.default_rng(3).integers(0, 256, (2, 90, 60, 3), dtype=np.uint8)
VIDEO = np.stack([np.roll(picture(7), 4 * number, 1) for number in range(9)])


def shown(folder):
    return thumbnails.build_cells(arrange_grid(collect_points(folder), None))


def content(uri: str, kind: str) -> bytes:
    start = f"data:{kind};base64,"
    assert uri.startswith(start)
    return base64.b64decode(uri[len(start) :])


def decoded(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content(uri, "image/webp"))).convert("RGB"))


def film(uri: str) -> np.ndarray:
    with av.open(io.BytesIO(content(uri, "video/mp4"))) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_differences_are_numpys():
    apart = thumbnails.measure_difference(*NOISE, 512)
    exact = np.abs(NOISE[0].astype(int) - NOISE[1])
    assert apart.largest == exact.max()
    assert apart.psnr == pytest.approx(10 * math.log10(255**2 / np.square(exact).mean()), abs=1e-9)
    assert np.array_equal(apart.pixels, exact)
    assert apart.ssim == compare_outputs(*NOISE, ["ssim"])["ssim"]


def test_differences_of_videos_are_over_all_frames():
    changed = VIDEO.copy()
    changed[0, 0, 0, 0] ^= 64  # not in the middle frame, which is shown
    apart = thumbnails.measure_difference(VIDEO, changed, 512)
    assert (apart.largest, apart.pixels.max(), apart.pixels.shape, apart.ssim) == (64, 0, (64, 64, 3), None)
    assert apart.psnr == pytest.approx(10 * math.log10(255**2 * VIDEO.size / 64**2))


def test_identical_pictures_are_at_the_cap_and_other_sizes_are_not_compared():
    same = thumbnails.measure_difference(NOISE[0], NOISE[0].copy(), 512)
    assert (same.psnr, same.ssim, same.largest) == (100.0, 1.0, 0)
    assert thumbnails.measure_difference(NOISE[0], NOISE[0][:64], 512) is None


def test_the_grid_s_cells(tmp_path):
    cells = shown(fake_sweep.grid(tmp_path))
    assert set(cells) == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert np.array_equal(decoded(cells[0, 1].image), picture(1, 10))  # small, so lossless
    assert (cells[0, 1].size, cells[0, 1].reduced, cells[0, 1].video) == ((64, 64), False, None)
    assert (cells[0, 0].difference, cells[1, 0].difference) == (None, None)
    assert [cells[row, 1].difference.largest for row in (0, 1)] == [10, 3]
    expected = [10 * math.log10(255**2 * 64 / off**2) for off in (10, 3)]  # 64 of the 4096 pixels are off
    assert [cells[row, 1].difference.psnr for row in (0, 1)] == pytest.approx(expected)


def test_one_amplification_makes_the_middle_difference_bright(tmp_path):
    cells = shown(fake_sweep.grid(tmp_path))
    strong = [float(np.percentile(cells[row, 1].difference.pixels, 99)) for row in (0, 1)]
    assert strong == [10, 3]
    assert thumbnails.choose_gain(cells.values()) == 32  # 6.5 * 32 = 208
    bright = decoded(thumbnails.encode_difference_uri(cells[0, 1].difference, 32))
    assert (bright[:8, :8] == 255).all()  # 320, cut off
    assert (bright[8:] == 0).all()
    assert decoded(thumbnails.encode_difference_uri(cells[1, 1].difference, 32))[0, 0].tolist() == [96, 96, 96]
    assert thumbnails.choose_gain([]) == 1


def test_large_pictures_are_reduced(tmp_path):
    large = np.repeat(np.repeat(picture(5), 20, 0), 16, 1)  # 1280 high, 1024 wide
    fake_sweep.add(tmp_path, "0", [], [large])
    cell = shown(tmp_path)[0, 0]
    small = decoded(cell.image)
    assert (small.shape, cell.size, cell.reduced) == ((512, 410, 3), (1024, 1280), True)
    assert abs(small.mean(axis=(0, 1)) - large.mean(axis=(0, 1))).max() < 2
    assert len(cell.image) < 40_000


def video_point(sweep, name: str, words: list[str], pixels: np.ndarray, path: str):
    """Add a point with a single video of 8 frames per second."""
    folder = fake_sweep.add(sweep, name, words, [pixels[0]])
    output = {"index": 0, "prompt": "a", "seed": 0, "path": path, "frames": len(pixels), "fps": 8}
    fake_sweep.change(folder, outputs=[output])
    if path.endswith(".mp4"):
        (folder / path).write_bytes(mp4.encode_mp4(pixels, 8, {}))
    else:
        frames.write_frames(folder / path, pixels, [{}] * len(pixels))
    return folder


def test_videos_play(tmp_path):
    folder = video_point(tmp_path, "0", ["cache=none"], VIDEO, "v.mp4")
    video_point(tmp_path, "1", ["cache=every_n"], VIDEO, "v")
    as_it_is, encoded = (shown(tmp_path)[0, column] for column in (0, 1))
    assert content(as_it_is.video, "video/mp4") == (folder / "v.mp4").read_bytes()
    assert (as_it_is.reduced, encoded.reduced) == (False, True)
    assert film(encoded.video).shape == VIDEO.shape
    assert np.abs(film(encoded.video).astype(int) - VIDEO).mean() < 3
    assert np.array_equal(decoded(encoded.image), VIDEO[4])  # the middle frame
    assert 0 < encoded.difference.largest < 64  # an mp4 is lossy


def test_large_videos_get_a_smaller_copy_of_even_size(tmp_path):
    large = np.repeat(np.repeat(VIDEO[:3], 6, 1), 10, 2)[:, :, :631]  # 384 high, 631 wide
    video_point(tmp_path, "0", [], large, "v")
    cell = shown(tmp_path)[0, 0]
    assert film(cell.video).shape == (3, 234, 384, 3)
    assert cell.size == (631, 384)


def test_a_file_that_is_gone_or_damaged_says_so_without_its_path(tmp_path):
    fake_sweep.grid(tmp_path)
    gone, damaged = (next((tmp_path / name).glob("*.png")) for name in ("0", "3"))
    gone.unlink()
    damaged.write_bytes(b"nothing")
    cells = shown(tmp_path)
    assert cells[0, 0] == "No such file or directory"
    assert cells[1, 1] == "not a PNG file, or damaged at its start"
    assert cells[0, 1].difference is None
    assert np.array_equal(decoded(cells[0, 1].image), picture(1, 10))


def test_very_many_rows_are_cut_off(tmp_path, monkeypatch):
    monkeypatch.setattr(thumbnails, "MOST_CELLS", 2)
    assert set(shown(fake_sweep.grid(tmp_path))) == {(0, 0), (0, 1)}
    assert png.read_png(next((tmp_path / "1").glob("*.png")))[0].shape == (64, 64, 3)


def test_odd_frame_rates_and_names_are_no_reason_to_stop(tmp_path):
    folder = video_point(tmp_path, "0", [], VIDEO, "v")
    for rate in (0, -3, 10**9):
        fake_sweep.change(
            folder, outputs=[{"index": 0, "prompt": "a", "seed": 0, "path": "v", "frames": 9, "fps": rate}]
        )
        assert film(shown(tmp_path)[0, 0].video).shape == VIDEO.shape
    fake_sweep.change(folder, outputs=[{"index": 0, "prompt": "a", "seed": 0, "path": "v" * 300}])
    assert shown(tmp_path)[0, 0] == "File name too long"
