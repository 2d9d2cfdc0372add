"""What a recipe keeps of its outputs' pixels beside their hash: block means, small enough for text; and a thumbnail."""

from __future__ import annotations

import base64
import io
import math

import numpy as np
from PIL import Image

from hydrarun.outputs.media import kinds

SIDE = 16  # blocks to each side
SAMPLE = 256  # pixels of the longer side of a thumbnail
CAP = 100.0  # dB; also stands for equal block means


def compute_fingerprint(pixels: np.ndarray) -> str:
    """The mean colours of 16 x 16 blocks of a picture (uint8 [H, W, 3]) as base64: 768 bytes.

    Of a video ([F, H, W, 3]) those of its first, middle and last frame; of layers ([L, H, W, 4]) of each, with alpha;
    of a sound ([samples, channels]) how loud it is in each of 768 parts of its time.
    """
    kind = kinds.find_array_kind(pixels)
    if kind is kinds.SOUND:
        return base64.b64encode(measure_loudness(pixels).tobytes()).decode()
    frames = [*pixels] if kind is kinds.LAYERS else [pixels]
    if kind is kinds.VIDEO:
        frames = [pixels[0], kind.still(pixels), pixels[-1]]
    means = (Image.fromarray(frame).resize((SIDE, SIDE), Image.Resampling.BOX) for frame in frames)
    return base64.b64encode(b"".join(image.tobytes() for image in means)).decode()


def measure_loudness(samples: np.ndarray) -> np.ndarray:
    """The loudest sample in each of 768 parts of a sound, in decibels: 255 is full scale, 0 silence."""
    starts = np.arange(3 * SIDE * SIDE) * len(samples) // (3 * SIDE * SIDE)
    loudest = np.maximum.reduceat(np.abs(samples.astype(np.int32)).max(axis=1), starts)
    return np.round(255 * (1 + 20 * np.log10(np.maximum(loudest, 1) / 32768) / 90.309)).astype(np.uint8)


def compare_fingerprints(one: str, other: str) -> float:
    """dB between two fingerprints, 0 for those that cannot be compared. Detail finer than a block does not count."""
    try:
        first, second = (np.frombuffer(base64.b64decode(text, validate=True), np.uint8) for text in (one, other))
    except ValueError:
        return 0.0
    if first.shape != second.shape or not first.size:
        return 0.0
    error = float(np.square(first.astype(np.float64) - second).mean())
    return min(CAP, 10 * math.log10(255**2 / error)) if error else CAP


def make_thumbnail(pixels: np.ndarray) -> bytes:
    """A WEBP file of what stands for an output (`Kind.still`), at most 256 pixels wide and high."""
    image = Image.fromarray(kinds.find_array_kind(pixels).still(pixels))
    image.thumbnail((SAMPLE, SAMPLE))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=85)
    return buffer.getvalue()
