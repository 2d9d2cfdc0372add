"""PNG files that carry their recipe in two text chunks.

`parameters` is the plain text that other image tools show (the AUTOMATIC1111 convention); `hydrarun` is the JSON that
`hydrarun replay` reads. docs/outputs.md documents both.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from hydrarun.core.errors import UsageError
from hydrarun.core.files import open_file
from hydrarun.outputs.media.recipe_text import check_text_sizes, parse_recipe

CHUNK = "hydrarun"

MAX_BYTES = 2**29  # of one file: more than the most pixels that Pillow decodes, without compression


def encode_png(pixels: np.ndarray, text: Mapping[str, str]) -> bytes:
    """Encode a PNG file. `pixels`: uint8 [H, W, 3], or [H, W, 4] with alpha; `text`: text chunks by keyword.

    Chunks that latin-1 cannot encode are UTF-8 (iTXt). Raises ValueError for a chunk that `read_png` would refuse.
    """
    check_text_sizes(text, "text chunk")
    chunks = PngImagePlugin.PngInfo()
    for keyword, value in text.items():
        chunks.add_text(keyword, value)
    buffer = io.BytesIO()
    Image.fromarray(pixels, "RGBA" if pixels.shape[-1] == 4 else "RGB").save(buffer, "PNG", pnginfo=chunks)
    return buffer.getvalue()


def read_png(path: Path) -> tuple[np.ndarray, dict[str, Any] | None]:
    """Read the pixels (uint8 [H, W, 3], or [H, W, 4]) and the recipe in the `hydrarun` chunk, None if there is none.

    The file is untrusted: raises a one-line UsageError for anything wrong with it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with open_file(path, MAX_BYTES) as file, Image.open(file, formats=["PNG"]) as image:
                image.load()  # also reads the text chunks that follow the pixels
                pixels = np.asarray(image.convert("RGBA" if image.mode == "RGBA" else "RGB"))
                text = getattr(image, "text", {}).get(CHUNK)
    except UnidentifiedImageError:
        raise UsageError(f"{path}: not a PNG file, or damaged at its start") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise UsageError(f"{path}: refused, more than {Image.MAX_IMAGE_PIXELS:,} pixels") from None
    except (OSError, SyntaxError, ValueError) as error:
        system = getattr(error, "strerror", None)  # no such file, ...; otherwise Pillow found damage
        raise UsageError(f"{path}: {system or f'damaged PNG file: {error}'}") from None
    return pixels, parse_recipe(path, text, f"{CHUNK!r} text chunk")
