"""Input images: the output size they imply, and their latents."""

from __future__ import annotations

import math
from typing import Literal

import torch
from PIL import Image

from hydrarun.core.timing import Timings
from hydrarun.models.layers.patchify import pack_latents
from hydrarun.pipeline.stage import Components, Stage
from hydrarun.pipeline.state import State
from hydrarun.pipeline.vae import encode_pixels


class SizeFromImage(Stage):
    """Sets an unset height or width: `area` pixels in the last input image's proportions.

    An `area` of null is that of a square with the side `sampling.resolution`. Both are rounded to a multiple of
    `multiple` pixels, the nearest or the next one up. `height` and `width` are the defaults for requests without an
    image, if the model allows them.
    """

    needs = ("input_images", "height", "width", "resolution")
    gives = ("height", "width")
    phase = "encode"

    def __init__(
        self,
        area: int | None,
        multiple: int,
        height: int = 0,
        width: int = 0,
        rounding: Literal["nearest", "up"] = "nearest",
    ) -> None:
        self.area = area
        self.multiple = multiple
        self.default = height, width
        self.rounding = rounding

    def __call__(self, state: State, parts: Components, timings: Timings) -> None:
        last = state.input_images[-1:]
        up = self.rounding == "up"
        area = self.area or (state.resolution or 0) ** 2
        height, width = fit_area(last[0], area, self.multiple, up) if last else self.default
        state.height, state.width = state.height or height, state.width or width


class EncodeImages(Stage):
    """Encodes each input image to packed latents, resized to `area` pixels in its own proportions.

    The sides are rounded to multiples of 32 pixels. An `area` of null: the output's height and width.
    """

    needs = ("input_images", "height", "width")
    gives = ("image_latents", "image_grids")
    phase = "encode"
    uses = ("vae",)

    def __init__(self, area: int | None) -> None:
        self.area = area

    def __call__(self, state: State, parts: Components, timings: Timings) -> None:
        packed, grids = [], []
        for image in state.input_images:
            height, width = self.size(image, state)
            pixels = parts.pipeline.image_processor.preprocess(image, height, width).unsqueeze(2)
            latents = encode_pixels(parts.pipeline, pixels).to(parts.dtype)
            packed.append(pack_latents(latents, parts.patch_size))
            grids.append((1, latents.shape[3] // parts.patch_size, latents.shape[4] // parts.patch_size))
        state.image_latents = torch.cat(packed, dim=1)
        state.image_grids = tuple(grids)

    def size(self, image: Image.Image, state: State) -> tuple[int, int]:
        """Return the height and width at which an image is encoded."""
        return fit_area(image, self.area, 32) if self.area else (state.height, state.width)


def fit_area(image: Image.Image, area: int, multiple: int, up: bool = False) -> tuple[int, int]:
    """Return a height and width of about `area` pixels in the image's proportions.

    Both are rounded to a multiple of `multiple`, the nearest one or the next one `up`.
    """
    whole = math.ceil if up else round
    ratio = image.width / image.height
    width = math.sqrt(area * ratio)
    return whole(width / ratio / multiple) * multiple, whole(width / multiple) * multiple
