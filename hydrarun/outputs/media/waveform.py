"""A sound as a picture, for where a player is not enough: thumbnails, comparisons, fingerprints."""

from __future__ import annotations

import numpy as np

WIDTH, HEIGHT = 512, 96  # pixels; the height is each channel's
INK, PAPER = (28, 78, 140), (247, 247, 245)


def draw_waveform(samples: np.ndarray) -> np.ndarray:
    """The waveforms (int16 [samples, channels]) one below the other: uint8 [96 x channels, 512, 3].

    A column of pixels shows the range of the samples in its share of the time.
    """
    starts = np.arange(WIDTH) * len(samples) // WIDTH
    lowest, highest = (function.reduceat(samples, starts, axis=0) for function in (np.minimum, np.maximum))
    return np.concatenate([_draw_channel(low, high) for low, high in zip(lowest.T, highest.T, strict=True)])


def _draw_channel(lowest: np.ndarray, highest: np.ndarray) -> np.ndarray:
    """One channel, from the ranges of its columns."""
    rows = np.arange(HEIGHT)[:, None]
    top, bottom = _row_of_level(highest), _row_of_level(lowest)
    inked = (rows >= top) & (rows <= bottom)
    return np.where(inked[..., None], np.array(INK, np.uint8), np.array(PAPER, np.uint8))


def _row_of_level(level: np.ndarray) -> np.ndarray:
    """The row of pixels that a level lies in: the loudest at the top."""
    return (32767 - level.astype(np.int64)) * (HEIGHT - 1) // 65535
