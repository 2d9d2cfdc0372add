"""Quality measures: PSNR, SSIM and (for sounds) SNR against the reference run; accuracy according to a judge."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from hydrarun.outputs.media.alpha import make_comparable

#: upper bound in dB, also for identical arrays: JSON has no infinity, and it would dominate a mean
PSNR_CAP = 100.0

#: the window of Wang et al. 2004, which is 11 pixels wide
SIGMA, WINDOW = 1.5, 11


def compare_outputs(ours: np.ndarray, twin: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """Compute the measures in `names` for a pair of outputs (arrays of `hydrarun.outputs.media.kinds`).

    `twin` is the output of the reference run. Layers are compared with premultiplied alpha. `psnr`: dB over all frames
    together, at most `PSNR_CAP`. `ssim`: at most 1, the mean over the frames. `snr`: power of `twin` over power of the
    difference, in dB, at most `PSNR_CAP`. Ignores `accuracy`, which needs no pair. Raises ValueError if shapes differ.
    """
    if ours.shape != twin.shape:
        raise ValueError(f"{list(ours.shape)} and {list(twin.shape)} cannot be compared")
    each = (make_comparable(pixels).reshape(-1, *pixels.shape[-3:]) for pixels in (ours, twin))
    pairs = list(zip(*each, strict=True))
    return {name: MEASURES[name](pairs) for name in names if name in MEASURES}


def measure_accuracy(pictures: Sequence[np.ndarray], prompts: Sequence[str]) -> float:
    """Return the share, 0 to 1, of pictures (uint8 `[side, side, 3]`) that match their prompts (`SceneVerdict.right`).

    Raises ValueError for a prompt outside the grammar of `hydrarun.outputs.quality.scenes`.
    """
    from hydrarun.outputs.quality.scene_judge import judge_pairs

    return judge_pairs(zip(pictures, prompts, strict=True)).right


def summarize_values(values: Sequence[float]) -> dict[str, float]:
    """Return `mean`, `p95` (95 % of the values reach or exceed it, interpolated linearly) and `worst` (smallest)."""
    return {"mean": float(np.mean(values)), "p95": float(np.percentile(values, 5)), "worst": float(min(values))}


Pairs = Sequence[tuple[np.ndarray, np.ndarray]]


def _measure_psnr(pairs: Pairs) -> float:
    from skimage.metrics import mean_squared_error  # imports scipy, so only when something is measured

    # frame by frame: a wider copy of a whole video may not fit in memory
    error = float(np.mean([mean_squared_error(*pair) for pair in pairs]))
    return min(PSNR_CAP, 10 * math.log10(255**2 / error)) if error else PSNR_CAP


def _measure_ssim(pairs: Pairs) -> float:
    from skimage.metrics import structural_similarity

    smallest = min(pairs[0][0].shape[:2])
    settings = {
        "win_size": min(WINDOW, smallest - (smallest + 1) % 2),  # odd, and at most the smaller side
        "gaussian_weights": True,
        "sigma": SIGMA,
        "use_sample_covariance": False,
        "data_range": 255,
        "channel_axis": -1,
    }
    return float(np.mean([structural_similarity(*pair, **settings) for pair in pairs]))


def _measure_snr(pairs: Pairs) -> float:
    ((ours, twin),) = pairs
    wide = twin.astype(np.float64)
    error, power = float(np.square(ours - wide).mean()), float(np.square(wide).mean())
    return min(PSNR_CAP, 10 * math.log10(power / error)) if error else PSNR_CAP


MEASURES: dict[str, Callable[[Pairs], float]] = {"psnr": _measure_psnr, "ssim": _measure_ssim, "snr": _measure_snr}


def summarize_measures(each: Sequence[Mapping[str, float]], metrics: Sequence[str]) -> dict[str, Any]:
    """Summarize the measures of many pairs: by name, mean, p95 and worst."""
    return {name: summarize_values([pair[name] for pair in each]) for name in metrics if name in MEASURES}
