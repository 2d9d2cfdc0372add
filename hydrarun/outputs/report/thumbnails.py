"""Builds the media that the page embeds for each cell: a small copy of the output and its difference from the
reference."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from hydrarun.core.errors import UsageError
from hydrarun.core.files import read_file
from hydrarun.outputs.media import kinds
from hydrarun.outputs.media.alpha import make_comparable
from hydrarun.outputs.media.read import read_output
from hydrarun.outputs.quality.metrics import PSNR_CAP, WINDOW, compare_outputs
from hydrarun.outputs.report.layout import GridLayout, GridRow

Reading = Callable[[Path], "np.ndarray | str"]

#: maximum number of cells that are read and shown; the page notes how many rows are left out
MOST_CELLS = 240

#: longest side of embedded media in pixels: of few pictures, of many pictures, of videos
SIDE, MANY_SIDE, VIDEO_SIDE = 512, 384, 384
MANY = 36  # more cells than this are many

#: WebP quality (of 100) of pictures, and of differences, whose amplified noise compresses badly
QUALITY, ROUGH = 82, 50

#: up to this many pixels a copy is lossless; up to this many bytes a video or sound is embedded unchanged
LOSSLESS, SMALL_FILE = 256 * 256, 2**20

#: bits per second of larger sounds
SOUND_RATE = 96_000

#: possible amplifications of the differences
GAINS = (32, 16, 8, 4, 2, 1)


@dataclass
class OutputDifference:
    """The difference between an output and the reference, over all pixels and frames: `psnr` in dB, at most 100;
    `largest`, at most `levels` (255, or 65535 for sounds).

    `ssim`: of pictures and layers; None for sounds, for videos, which would take minutes, and for pictures smaller than
    the window. `pixels`: uint8 `[h, w, 3]`, the absolute difference of the stills (`Kind.still`) at the embedded size.
    """

    psnr: float
    ssim: float | None
    largest: int
    pixels: np.ndarray
    levels: int = 255


@dataclass
class CellMedia:
    """The media of a cell. Data URIs: `image` (`Kind.still` of the output), `video` and `sound`. `size`: width and
    height of the output, or of the waveform of a sound."""

    image: str
    size: tuple[int, int]
    reduced: bool  # whether the embedded media are smaller or more compressed than the original
    video: str | None
    difference: OutputDifference | None
    sound: str | None = None


Cell = tuple[int, int]  # row, column


def count_shown_rows(layout: GridLayout) -> int:
    """Return the maximum number of rows that are shown."""
    return max(1, MOST_CELLS // len(layout.columns))


def build_cells(layout: GridLayout) -> dict[Cell, CellMedia | str]:
    """Build every cell that has an output; a string is the reason why its file cannot be shown."""
    rows = layout.rows[: count_shown_rows(layout)]
    side = SIDE if len(rows) * len(layout.columns) <= MANY else MANY_SIDE
    reading = lru_cache(maxsize=2)(read_pixels)  # reference and output only: pixels may be large
    return {
        (number, column): found
        for number, row in enumerate(rows)
        for column, found in build_row_cells(layout, row, side, reading)
    }


def build_row_cells(
    layout: GridLayout, row: GridRow, side: int, reading: Reading
) -> Iterator[tuple[int, CellMedia | str]]:
    """Yield the cells of a row with their columns."""
    for column in sorted(row.cells):
        file = find_output_file(layout, row, column)
        if file is None:
            continue
        reference = layout.reference(row, column)
        other = None if reference in (None, column) else find_output_file(layout, row, reference)
        ours, theirs = reading(file), reading(other) if other else ""
        if isinstance(ours, str):
            yield column, ours
        else:
            apart = measure_difference(ours, theirs, side) if not isinstance(theirs, str) else None
            yield column, build_cell_media(file, ours, find_output_rate(row, column), apart, side)


def find_output_file(layout: GridLayout, row: GridRow, column: int) -> Path | None:
    """Return the file or folder of frames of a cell; None if there is no output."""
    point, output = row.cells[column]
    return layout.points[point].folder / output.path if output and output.path else None


def find_output_rate(row: GridRow, column: int) -> int:
    """Return the frames per second of a video, or the samples per second of a sound."""
    output = row.cells[column][1]
    if output and output.sample_rate:
        return output.sample_rate if 0 < output.sample_rate < 10**6 else 44100
    rate = output.fps if output else None
    return rate if rate and 0 < rate < 1000 else 16


def read_pixels(file: Path) -> np.ndarray | str:
    """Read a file as an array (`hydrarun.outputs.media.kinds`); a string is the reason why it cannot be read."""
    try:
        return read_output(file)[0]
    except UsageError as error:
        return str(error).removeprefix(f"{file}: ")
    except OSError as error:
        return error.strerror or "cannot be read"


def measure_difference(ours: np.ndarray, theirs: np.ndarray, side: int) -> OutputDifference | None:
    """Measure the difference of two outputs; None if their shapes differ."""
    if ours.shape != theirs.shape:
        return None
    # frame by frame: a wider copy of a whole video may not fit in memory
    each = (make_comparable(pixels).reshape(-1, *pixels.shape[-3:]) for pixels in (ours, theirs))
    apart_by_frame = map(compute_distance, zip(*each, strict=True))
    measured = [(int(apart.max()), float(np.square(apart, dtype=np.uint32).mean())) for apart in apart_by_frame]
    error = sum(mean for _, mean in measured) / len(measured)
    psnr = min(PSNR_CAP, 10 * math.log10(kinds.find_array_kind(ours).levels ** 2 / error)) if error else PSNR_CAP
    pixels = np.asarray(shrink_picture(compute_distance((pick_still(ours), pick_still(theirs))), side))
    quick = kinds.find_array_kind(ours) in (kinds.PICTURE, kinds.LAYERS) and min(ours.shape[-3:-1]) >= WINDOW
    ssim = compare_outputs(ours, theirs, ["ssim"])["ssim"] if quick else None
    return OutputDifference(psnr, ssim, max(most for most, _ in measured), pixels, kinds.find_array_kind(ours).levels)


def compute_distance(pair: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Return |a - b|: uint8 `[H, W, C]`; for int16 samples uint16, which any difference fits into."""
    apart = np.maximum(*pair) - np.minimum(*pair)
    return apart if apart.dtype == np.uint8 else apart.view(np.uint16)


def pick_still(pixels: np.ndarray) -> np.ndarray:
    """Return the picture itself, the middle frame of a video, all layers, or the waveform of a sound."""
    return kinds.find_array_kind(pixels).still(pixels)


def build_cell_media(file: Path, pixels: np.ndarray, rate: int, apart: OutputDifference | None, side: int) -> CellMedia:
    """Build the embedded media of one output. `rate`: frames or samples per second."""
    still = pick_still(pixels)
    small = shrink_picture(still, side)
    whole_size = still.shape[1], still.shape[0]
    size = (pixels.shape[-2], pixels.shape[-3]) if kinds.find_array_kind(pixels) is kinds.LAYERS else whole_size
    if kinds.find_array_kind(pixels) in (kinds.PICTURE, kinds.LAYERS):
        return CellMedia(
            encode_picture_uri(small), size, small.size != whole_size or not is_small_picture(small), None, apart
        )
    if kinds.find_array_kind(pixels) is kinds.SOUND:
        whole = file.stat().st_size <= SMALL_FILE
        sound = format_data_uri("audio/wav", read_file(file, SMALL_FILE)) if whole else encode_sound_uri(pixels, rate)
        return CellMedia(encode_picture_uri(small), size, not whole, None, apart, sound)
    if file.is_file() and file.stat().st_size <= SMALL_FILE and max(size) <= SIDE:
        whole_video = format_data_uri("video/mp4", read_file(file, SMALL_FILE))
        return CellMedia(encode_picture_uri(small), size, False, whole_video, apart)
    return CellMedia(encode_picture_uri(small), size, True, encode_video_uri(pixels, rate), apart)


def shrink_picture(pixels: np.ndarray, side: int) -> Image.Image:
    """Shrink a picture so that its longest side is at most `side` pixels."""
    image = Image.fromarray(pixels)
    image.thumbnail((side, side), Image.Resampling.BOX, reducing_gap=None)
    return image


def encode_picture_uri(image: Image.Image, quality: int = QUALITY) -> str:
    """Encode a picture as WebP, lossless if it is small."""
    data = io.BytesIO()
    image.save(data, "WEBP", lossless=is_small_picture(image), quality=quality, method=2)
    return format_data_uri("image/webp", data.getvalue())


def is_small_picture(image: Image.Image) -> bool:
    """Return whether a picture is embedded losslessly."""
    return image.width * image.height <= LOSSLESS


def encode_video_uri(pixels: np.ndarray, fps: int) -> str | None:
    """Encode a smaller MP4; None if a side would be below two pixels."""
    from hydrarun.outputs.media import mp4

    small = np.stack([np.asarray(shrink_picture(frame, VIDEO_SIDE)) for frame in pixels])
    height, width = (side - side % 2 for side in small.shape[1:3])
    return (
        format_data_uri("video/mp4", mp4.encode_mp4(small[:, :height, :width], fps, {})) if height and width else None
    )


def encode_sound_uri(samples: np.ndarray, rate: int) -> str:
    """Encode a smaller file, AAC in MP4."""
    import av

    from hydrarun.outputs.media import wav

    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        wav.write_samples(container, "aac", samples, rate)
    return format_data_uri("audio/mp4", file.getvalue())


def choose_gain(cells: Iterable[CellMedia | str]) -> int:
    """Choose one gain for all differences, so that they are comparable: it makes the median difference bright."""
    apart = [cell.difference.pixels for cell in cells if isinstance(cell, CellMedia) and cell.difference]
    strong = [most for most in (float(np.percentile(pixels, 99)) for pixels in apart) if most]
    return next((times for times in GAINS if strong and times * float(np.median(strong)) <= 255), 1)


def encode_difference_uri(apart: OutputDifference, times: int) -> str:
    """Encode the amplified difference as a picture."""
    bright = np.minimum(apart.pixels.astype(np.uint16) * times, 255).astype(np.uint8)
    return encode_picture_uri(Image.fromarray(bright), ROUGH)


def format_data_uri(kind: str, data: bytes) -> str:
    """Encode bytes as a data URI."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
