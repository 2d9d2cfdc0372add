"""The measures compared with scikit-image on whole arrays and with their formulas, and edge cases."""

import json
import math

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from hydrarun.outputs.quality.metrics import compare_outputs, measure_accuracy, summarize_values
from hydrarun.outputs.quality.scenes import parse_caption, render_scene

BOTH = ["psnr", "ssim"]


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


def near(pixels: np.ndarray, spread: int) -> np.ndarray:
    change = np.random.default_rng(1).integers(-spread, spread + 1, pixels.shape)
    return np.clip(pixels.astype(int) + change, 0, 255).astype(np.uint8)


def test_a_difference_of_one_everywhere():
    grey = np.full((32, 32, 3), 100, np.uint8)
    found = compare_outputs(grey + 1, grey, ["psnr"])
    assert found == {"psnr": pytest.approx(20 * math.log10(255))}


def test_psnr_and_ssim_of_a_picture_are_scikit_images():
    twin = noise(40, 56)
    ours = near(twin, 20)
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "channel_axis": -1}
    assert compare_outputs(ours, twin, BOTH) == {
        "psnr": pytest.approx(peak_signal_noise_ratio(twin, ours)),
        "ssim": pytest.approx(structural_similarity(twin, ours, data_range=255, **settings)),
    }


def test_the_window_is_gaussian():
    """A flat window gives another SSIM than a Gaussian one, so the settings must be passed on."""
    twin = noise(40, 56)
    ours = near(twin, 20)
    flat = structural_similarity(twin, ours, data_range=255, channel_axis=-1)
    assert abs(compare_outputs(ours, twin, ["ssim"])["ssim"] - flat) > 1e-4


def test_psnr_of_a_video_is_of_all_its_frames_together_and_ssim_their_mean():
    twin = noise(3, 24, 24)
    ours = twin.copy()
    ours[1] = near(twin[1], 60)
    found = compare_outputs(ours, twin, BOTH)
    assert found["psnr"] == pytest.approx(peak_signal_noise_ratio(twin, ours))
    alone = [compare_outputs(one, other, ["ssim"])["ssim"] for one, other in zip(ours, twin, strict=True)]
    assert alone[0] == alone[2] == 1.0
    assert found["ssim"] == pytest.approx((2 + alone[1]) / 3)


@pytest.mark.parametrize("shape", [(16, 16), (2, 16, 16)])
def test_identical_is_100_db_and_1(shape):
    assert compare_outputs(noise(*shape), noise(*shape), BOTH) == {"psnr": 100.0, "ssim": 1.0}


def test_psnr_is_capped():
    """A difference of one level in one of four million values is 114 dB, above the cap."""
    twin = np.full((1200, 1200, 3), 7, np.uint8)
    ours = twin.copy()
    ours[0, 0, 0] += 1
    assert compare_outputs(ours, twin, ["psnr"]) == {"psnr": 100.0}


@pytest.mark.parametrize("shape", [(8, 8), (10, 64), (11, 11), (12, 5)])
def test_tiny_pictures_have_a_smaller_window(shape):
    twin = noise(*shape)
    assert -1 < compare_outputs(255 - twin, twin, ["ssim"])["ssim"] < 0.2


def test_only_what_is_asked_for_and_what_is_about_pairs():
    assert list(compare_outputs(noise(16, 16), noise(16, 16), ["ssim", "accuracy"])) == ["ssim"]


def test_unequal_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\[16, 16, 3\] and \[16, 24, 3\] cannot be compared"):
        compare_outputs(noise(16, 16), noise(16, 24), BOTH)


def test_summary_is_mean_the_5th_percentile_and_the_worst():
    values = [float(value) for value in range(20, 41)]  # 20 … 40: one in twenty lies below 21
    assert summarize_values(values[::-1]) == {"mean": 30.0, "p95": 21.0, "worst": 20.0}
    assert summarize_values([10.0, 20.0]) == {"mean": 15.0, "p95": 10.5, "worst": 10.0}
    assert summarize_values([33.0]) == {"mean": 33.0, "p95": 33.0, "worst": 33.0}


def test_numbers_fit_into_json():
    found = compare_outputs(noise(16, 16, seed=2), noise(16, 16), BOTH)
    assert json.loads(json.dumps({**found, **summarize_values([1.0, 2.0])})) == {
        **found,
        **summarize_values([1.0, 2.0]),
    }


def test_accuracy_is_the_share_of_right_pictures():
    texts = ["a red circle on a white background", "a large blue star on a yellow background"]
    drawn = [render_scene(parse_caption(text)) for text in texts]
    assert measure_accuracy(drawn, texts) == 1.0
    assert measure_accuracy([drawn[0], drawn[0]], texts) == 0.5
    assert measure_accuracy(drawn[::-1], texts) == 0.0
