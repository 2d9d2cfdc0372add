"""Draws a sound as a picture, for thumbnails, comparisons and fingerprints."""

from __future__ import annotations

import numpy as np

WIDTH, HEIGHT = 512, 96  # pixels; the height is per channel
INK, PAPER = (28, 78, 140), (247, 247, 245)


def draw_waveform(samples: np.ndarray) -> np.ndarray:
    """Draw the waveforms of the channels (int16 [samples, channels]) below each other: uint8 [96 x channels, 512, 3].

    Each column of pixels shows the range of the samples in its time interval.
    """
    starts = np.arange(WIDTH) * len(samples) // WIDTH
    lowest, highest = (function.reduceat(samples, starts, axis=0) for function in (np.minimum, np.maximum))
    return np.concatenate([_draw_channel(low, high) for low, high in zip(lowest.T, highest.T, strict=True)])


def _draw_channel(lowest: np.ndarray, highest: np.ndarray) -> np.ndarray:
    """Draw one channel from the lowest and highest sample of each column."""
    rows = np.arange(HEIGHT)[:, None]
    top, bottom = _row_of_level(highest), _row_of_level(lowest)
    inked = (rows >= top) & (rows <= bottom)
    return np.where(inked[..., None], np.array(INK, np.uint8), np.array(PAPER, np.uint8))


def _row_of_level(level: np.ndarray) -> np.ndarray:
    """Return the pixel row of a sample value; the maximum is at the top."""
    return (32767 - level.astype(np.int64)) * (HEIGHT - 1) // 65535
