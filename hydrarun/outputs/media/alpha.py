"""Layers with alpha, uint8 `[L, H, W, 4]`: how they are compared and displayed."""

from __future__ import annotations

import numpy as np

#: the checkerboard behind transparent pixels: side of a square in pixels, and its two greys
SQUARE, GREYS = 8, (204, 255)


def premultiply_alpha(pixels: np.ndarray) -> np.ndarray:
    """Multiply the colours by alpha, uint8 `[..., 4]`, so that invisible pixels are equal."""
    alpha = pixels[..., 3:].astype(np.uint16)
    seen = (pixels[..., :3] * alpha + 127) // 255
    return np.concatenate([seen, alpha], axis=-1).astype(np.uint8)


def make_comparable(pixels: np.ndarray) -> np.ndarray:
    """Return the pixels as metrics compare them: premultiplied if they have alpha, otherwise unchanged."""
    return premultiply_alpha(pixels) if pixels.shape[-1] == 4 else pixels


def draw_side_by_side(layers: np.ndarray) -> np.ndarray:
    """Draw the layers from left to right over a checkerboard: uint8 `[H, L * W, 3]`."""
    seen = premultiply_alpha(layers).astype(np.uint16)
    rows, columns = np.indices(layers.shape[1:3]) // SQUARE
    board = np.where((rows + columns) % 2, *GREYS)[..., None]
    flat = seen[..., :3] + (255 - seen[..., 3:]) * board // 255
    return np.concatenate(list(np.minimum(flat, 255).astype(np.uint8)), axis=1)
