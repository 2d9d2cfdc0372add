"""Reads input pictures: a local PNG, JPEG, WEBP, BMP or TIFF file becomes an upright 8-bit sRGB image."""

from __future__ import annotations

import hashlib
import io
import os
import re
import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageChops, ImageCms, UnidentifiedImageError
from PIL.ExifTags import Base
from PIL.Image import Transpose

from hydrarun.core.errors import UsageError, suggest_name
from hydrarun.core.files import open_file
from hydrarun.outputs.media.png import MAX_BYTES

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
MIN_SIDE = 16
MAX_ASPECT = 20

# the transpose that turns a picture upright, by EXIF orientation
UPRIGHT = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class InputImage:
    """An input picture. `image`: mode RGB, or RGBA if requested; upright, without metadata. `path`: absolute.

    `sha256`: of the file's bytes, in hex. `note`: a remark for the user about how the file was read, such as
    `transparency laid over white`, or None.
    """

    image: Image.Image
    path: Path
    sha256: str
    note: str | None


class _RefusedError(Exception):
    """The reason why a file is refused; `read_image` prefixes the config key and the path."""


def read_image(path: str | Path, alpha: bool = False) -> InputImage:
    """Read the picture in a local file; `~` is the home folder. Transparency is laid over white, or kept if `alpha`.

    Raises UsageError, one line that starts with `input.images: PATH: `, for a file that is missing, damaged, of another
    format, or with several frames, 16 bits per channel, too many pixels, a side below 16 or beyond 20 times the other.
    The latest pictures are cached, because the checks before a run read the same files as the run.
    """
    local = Path(os.path.expanduser(path)).absolute()
    try:
        status = local.stat()
    except (OSError, ValueError):
        return _read_cached(str(path), local, alpha, None)  # raises
    return _read_cached(str(path), local, alpha, (status.st_ino, status.st_size, status.st_mtime_ns))


@lru_cache(maxsize=4)
def _read_cached(path: str, local: Path, alpha: bool, stamp: tuple[int, int, int] | None) -> InputImage:
    """Read and decode the file; `stamp` changes whenever the file does, so that a stale cache entry is not used."""
    notes: list[str] = []
    try:
        with _open_file(local) as file:
            sha256 = _hash_file(file)
            image = _decode_image(file, notes)
            turn = _find_turn(image, notes)
    except _RefusedError as refused:
        raise UsageError(f"input.images: {path}: {refused}") from None
    plain = _keep_alpha(image, notes) if alpha else _lay_over_white(image, notes)
    return InputImage(plain if turn is None else plain.transpose(turn), local, sha256, "; ".join(notes) or None)


def _open_file(path: Path) -> BinaryIO:
    try:
        return open_file(path, MAX_BYTES)
    except FileNotFoundError:
        raise _RefusedError(_describe_missing(path)) from None
    except OSError as error:
        raise _RefusedError(str(error.strerror)) from None


def _describe_missing(path: Path) -> str:
    if re.search(r"(^|/)[a-z][a-z0-9+.-]*:/", str(path), re.IGNORECASE):
        return "only local files can be read, not URLs: download it first"
    try:
        return f"no such file.{suggest_name(path.name, os.listdir(path.parent))}"
    except OSError:
        return f"no such file, and no folder {path.parent}"


def _hash_file(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _decode_image(file: BinaryIO, notes: list[str]) -> Image.Image:
    """Open the image and read all its pixels."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings about unusual metadata
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(file, formats=FORMATS)
            _check_header(image, notes)
            image.load()
            return image
    except _RefusedError:
        raise
    except UnidentifiedImageError:
        raise _RefusedError("not a PNG, JPEG, WEBP, BMP or TIFF image, or damaged at its start") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise _RefusedError(f"more than {Image.MAX_IMAGE_PIXELS:,} pixels") from None
    except Exception as error:  # Pillow's decoders raise nearly anything for a damaged file
        raise _RefusedError(f"damaged or cut short: {error}") from None


def _check_header(image: Image.Image, notes: list[str]) -> None:
    """Refuse an unsuitable image by its header, before decoding the pixels takes time and memory."""
    frames = getattr(image, "n_frames", 1)
    if image.format == "MPO":  # a JPEG with previews or a depth map stored after the photo
        notes.append(f"the first of the {frames} pictures in this JPEG")
    elif frames > 1:
        raise _RefusedError(f"{frames} frames or pages; save the one you want as a separate file")
    if image.mode.startswith(("I", "F")):
        raise _RefusedError(f"more than 8 bits per channel (mode {image.mode}): save it with 8 bits per channel")
    if image.mode not in MODES:
        raise _RefusedError(f"colour mode {image.mode}: save it as RGB with 8 bits per channel")
    short, long = sorted(image.size)
    if short < MIN_SIDE:
        raise _RefusedError(f"{image.width} x {image.height} pixels; each side needs at least {MIN_SIDE}")
    if long > MAX_ASPECT * short:
        raise _RefusedError(
            f"{image.width} x {image.height} pixels; the longer side may be at most {MAX_ASPECT} times the shorter"
        )


def _find_turn(image: Image.Image, notes: list[str]) -> Transpose | None:
    try:
        return UPRIGHT.get(image.getexif().get(Base.Orientation, 1))
    except Exception:  # damaged EXIF data raises nearly any exception, and the pixels are usable
        notes.append("its EXIF data cannot be read: taken as upright")
        return None


def _lay_over_white(image: Image.Image, notes: list[str]) -> Image.Image:
    """Return a new RGB image over white, without metadata so that no later code rotates or converts it again."""
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA")
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    flat = Image.new("RGB", image.size, "white")
    flat.paste(_convert_to_srgb(image, notes), mask=alpha)
    if alpha is not None and np.asarray(alpha).min() < 255:
        notes.append("transparency laid over white")
    return flat


def _keep_alpha(image: Image.Image, notes: list[str]) -> Image.Image:
    """Return a new RGBA image without metadata; opaque if the source has no transparency."""
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA")
    found = Image.merge("RGBA", (*_convert_to_srgb(image, notes).split(), Image.new("L", image.size, 255)))
    if image.has_transparency_data:
        found.putalpha(image.convert("RGBA").getchannel("A"))
    return found


def _convert_to_srgb(image: Image.Image, notes: list[str]) -> Image.Image:
    """Convert to RGB, applying the embedded colour profile if it makes a difference."""
    plain = image.convert("RGB")
    if not image.info.get("icc_profile"):
        return plain
    try:
        converted = _apply_profile(image)
    except (ImageCms.PyCMSError, OSError):
        notes.append("its colour profile cannot be used: taken as sRGB")
        return plain
    # up to two levels are rounding: the profile is equivalent to sRGB, so the pixels are kept
    spread = np.asarray(ImageChops.difference(plain, converted)).max()
    return converted if spread > 2 else plain


def _apply_profile(image: Image.Image) -> Image.Image:
    source = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
    grey = image.mode in ("1", "L", "LA") and source.profile.xcolor_space == "GRAY"
    colours = image.convert("L" if grey else "CMYK" if image.mode == "CMYK" else "RGB")
    srgb, intent = ImageCms.createProfile("sRGB"), ImageCms.Intent.RELATIVE_COLORIMETRIC
    return ImageCms.buildTransform(source, srgb, colours.mode, "RGB", intent).apply(colours)
