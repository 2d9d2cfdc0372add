"""What a recipe keeps of its outputs' pixels beside their hash: block means, small enough for text; and a thumbnail."""

from __future__ import annotations

import base64
import io
import math

import numpy as np
from PIL import Image

from hydrarun.media import kinds

SIDE = 16  # blocks to each side
SAMPLE = 256  # pixels of the longer side of a thumbnail
CAP = 100.0  # dB; also stands for equal block means


def fingerprint(pixels: np.ndarray) -> str:
    """The mean colours of 16 x 16 blocks of a picture (uint8 [H, W, 3]) as base64: 768 bytes.

    Of a video ([F, H, W, 3]) those of its first, middle and last frame; of layers ([L, H, W, 4]) of each, with alpha;
    of a sound those of its waveform.
    """
    kind = kinds.of(pixels)
    frames = [kind.still(pixels)]
    if kind is kinds.VIDEO:
        frames = [pixels[0], *frames, pixels[-1]]
    elif kind is kinds.LAYERS:
        frames = list(pixels)
    means = (Image.fromarray(frame).resize((SIDE, SIDE), Image.Resampling.BOX) for frame in frames)
    return base64.b64encode(b"".join(image.tobytes() for image in means)).decode()


def psnr(one: str, other: str) -> float:
    """dB between two fingerprints, 0 for those that cannot be compared. Detail finer than a block does not count."""
    try:
        first, second = (np.frombuffer(base64.b64decode(text, validate=True), np.uint8) for text in (one, other))
    except ValueError:
        return 0.0
    if first.shape != second.shape or not first.size:
        return 0.0
    error = float(np.square(first.astype(np.float64) - second).mean())
    return min(CAP, 10 * math.log10(255**2 / error)) if error else CAP


def sample(pixels: np.ndarray) -> bytes:
    """A WEBP file of what stands for an output (`Kind.still`), at most 256 pixels wide and high."""
    image = Image.fromarray(kinds.of(pixels).still(pixels))
    image.thumbnail((SAMPLE, SAMPLE))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=85)
    return buffer.getvalue()
