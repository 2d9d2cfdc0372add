"""Reads any output file or folder of a run; the path determines the format."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from hydrarun.outputs.media.frames import read_frames
from hydrarun.outputs.media.png import read_png


def read_output(path: Path) -> tuple[np.ndarray, dict[str, Any] | None]:
    """Read a PNG, MP4, WAV or folder of frames or layers: its array (`hydrarun.outputs.media.kinds`) and its recipe.

    Raises a one-line UsageError for a damaged file or another format.
    """
    suffix = path.suffix.lower()
    if os.path.isdir(path):
        return read_frames(path)
    if suffix == ".mp4":
        from hydrarun.outputs.media.mp4 import read_mp4  # imports av, so only for videos and sounds

        return read_mp4(path)
    if suffix == ".wav":
        from hydrarun.outputs.media.wav import read_wav

        return read_wav(path)
    return read_png(path)
