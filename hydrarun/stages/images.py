"""Input images: the size they ask for, and themselves as latents."""

from __future__ import annotations

import math

import torch
from PIL import Image

from hydrarun.latents import pack
from hydrarun.pipeline import Parts, Stage
from hydrarun.state import State
from hydrarun.timing import Timings
from hydrarun.vae import encode


class SizeFromImage(Stage):
    """Where height or width is not set: `area` pixels in the last input image's proportions.

    Both are rounded to a multiple of `multiple` pixels. `height` and `width` are taken where there is no image, for
    models that can do without.
    """

    needs = ("input_images", "height", "width")
    gives = ("height", "width")
    phase = "encode"

    def __init__(self, area: int, multiple: int, height: int = 0, width: int = 0) -> None:
        self.area = area
        self.multiple = multiple
        self.default = height, width

    def __call__(self, state: State, parts: Parts, timings: Timings) -> None:
        last = state.input_images[-1:]
        height, width = fit_area(last[0], self.area, self.multiple) if last else self.default
        state.height, state.width = state.height or height, state.width or width


class EncodeImages(Stage):
    """Each input image as packed latents, drawn at `area` pixels in its own proportions.

    The sides are rounded to 32 pixels.
    """

    needs = ("input_images",)
    gives = ("image_latents", "image_grids")
    phase = "encode"
    uses = ("vae",)

    def __init__(self, area: int) -> None:
        self.area = area

    def __call__(self, state: State, parts: Parts, timings: Timings) -> None:
        packed, grids = [], []
        for image in state.input_images:
            height, width = fit_area(image, self.area, 32)
            pixels = parts.pipeline.image_processor.preprocess(image, height, width).unsqueeze(2)
            latents = encode(parts.pipeline, pixels).to(parts.dtype)
            packed.append(pack(latents, parts.patch_size))
            grids.append((1, latents.shape[3] // parts.patch_size, latents.shape[4] // parts.patch_size))
        state.image_latents = torch.cat(packed, dim=1)
        state.image_grids = tuple(grids)


def fit_area(image: Image.Image, area: int, multiple: int) -> tuple[int, int]:
    """Height and width of about `area` pixels in the image's proportions, rounded to a multiple of `multiple`."""
    ratio = image.width / image.height
    width = math.sqrt(area * ratio)
    return round(width / ratio / multiple) * multiple, round(width / multiple) * multiple
