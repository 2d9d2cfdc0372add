"""Any finished file or folder of ours, by its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from hydrarun.outputs.media import frames, png


def read(path: Path) -> tuple[np.ndarray, dict[str, Any] | None]:
    """What a PNG, an MP4, a WAV or a folder of frames holds (`hydrarun.outputs.media.kinds`), and the recipe inside it.

    Raises UsageError of one line for a file that is not whole, or another.
    """
    suffix = path.suffix.lower()
    if path.is_dir():
        return frames.read(path)
    if suffix == ".mp4":
        from hydrarun.outputs.media import mp4  # and its library only for videos and sounds

        return mp4.read(path)
    if suffix == ".wav":
        from hydrarun.outputs.media import wav

        return wav.read(path)
    return png.read(path)
