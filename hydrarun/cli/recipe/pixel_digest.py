"""Fingerprints of outputs for recipes: block means that are small enough for text, and thumbnails."""

from __future__ import annotations

import base64
import io
import math

import numpy as np
from PIL import Image

from hydrarun.outputs.media import kinds

SIDE = 16  # blocks per side
SAMPLE = 256  # most pixels of the longer side of a thumbnail
CAP = 100.0  # dB; also the value for equal block means


def compute_fingerprint(pixels: np.ndarray) -> str:
    """Return the mean colours of 16 x 16 blocks of a picture (uint8 `[H, W, 3]`) as base64: 768 bytes.

    A video (`[F, H, W, 3]`) uses its first, middle and last frame, layers (`[L, H, W, 4]`) each layer with alpha, and
    a sound (`[samples, channels]`) its loudness in each of 768 parts of its duration.
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
    """Return the loudest sample in each of 768 parts of a sound on a decibel scale: 255 is full scale, 0 silence."""
    starts = np.arange(3 * SIDE * SIDE) * len(samples) // (3 * SIDE * SIDE)
    loudest = np.maximum.reduceat(np.abs(samples.astype(np.int32)).max(axis=1), starts)
    return np.round(255 * (1 + 20 * np.log10(np.maximum(loudest, 1) / 32768) / 90.309)).astype(np.uint8)


def compare_fingerprints(one: str, other: str) -> float:
    """Return the PSNR in dB between two fingerprints, or 0 if they cannot be compared. Ignores detail within blocks."""
    try:
        first, second = (np.frombuffer(base64.b64decode(text, validate=True), np.uint8) for text in (one, other))
    except ValueError:
        return 0.0
    if first.shape != second.shape or not first.size:
        return 0.0
    error = float(np.square(first.astype(np.float64) - second).mean())
    return min(CAP, 10 * math.log10(255**2 / error)) if error else CAP


def make_thumbnail(pixels: np.ndarray) -> bytes:
    """Encode the preview picture of an output (`Kind.still`) as WEBP, at most 256 pixels wide and high."""
    image = Image.fromarray(kinds.find_array_kind(pixels).still(pixels))
    image.thumbnail((SAMPLE, SAMPLE))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=85)
    return buffer.getvalue()
