"""Layers, uint8 `[L, H, W, 4]`: colours with alpha, as they are compared and as they are shown."""

from __future__ import annotations

import numpy as np

#: of the checkerboard that shows through: pixels of a square's side, and its two greys
SQUARE, GREYS = 8, (204, 255)


def is_layers(pixels: np.ndarray) -> bool:
    """Whether these are layers, and not a video `[F, H, W, 3]` or a picture."""
    return pixels.ndim == 4 and pixels.shape[-1] == 4


def premultiplied(pixels: np.ndarray) -> np.ndarray:
    """uint8 `[..., 4]` with the colours times alpha: what cannot be seen is equal."""
    alpha = pixels[..., 3:].astype(np.uint16)
    seen = (pixels[..., :3] * alpha + 127) // 255
    return np.concatenate([seen, alpha], axis=-1).astype(np.uint8)


def comparable(pixels: np.ndarray) -> np.ndarray:
    """Pixels as their difference counts: with alpha premultiplied, others as they are."""
    return premultiplied(pixels) if pixels.shape[-1] == 4 else pixels


def side_by_side(layers: np.ndarray) -> np.ndarray:
    """Layers from left to right over a checkerboard: uint8 `[H, L * W, 3]`."""
    seen = premultiplied(layers).astype(np.uint16)
    rows, columns = np.indices(layers.shape[1:3]) // SQUARE
    board = np.where((rows + columns) % 2, *GREYS)[..., None]
    flat = seen[..., :3] + (255 - seen[..., 3:]) * board // 255
    return np.concatenate(list(np.minimum(flat, 255).astype(np.uint8)), axis=1)


def still(pixels: np.ndarray) -> np.ndarray:
    """What stands for an output where there is room for one picture: uint8 `[H, W, 3]`.

    The picture itself, the middle frame of a video, or layers side by side.
    """
    if is_layers(pixels):
        return side_by_side(pixels)
    picture = pixels if pixels.ndim == 3 else pixels[len(pixels) // 2]
    return side_by_side(picture[None]) if picture.shape[-1] == 4 else picture
