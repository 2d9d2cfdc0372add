"""Any finished file or folder of ours, by its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from hydrarun.outputs.media.frames import read_frames
from hydrarun.outputs.media.png import read_png


def read_output(path: Path) -> tuple[np.ndarray, dict[str, Any] | None]:
    """What a PNG, an MP4, a WAV or a folder of frames holds (`hydrarun.outputs.media.kinds`), and the recipe inside it.

    Raises UsageError of one line for a file that is not whole, or another.
    """
    suffix = path.suffix.lower()
    if path.is_dir():
        return read_frames(path)
    if suffix == ".mp4":
        from hydrarun.outputs.media.mp4 import read_mp4  # and its library only for videos and sounds

        return read_mp4(path)
    if suffix == ".wav":
        from hydrarun.outputs.media.wav import read_wav

        return read_wav(path)
    return read_png(path)
