"""A folder of PNG files, each with its recipe inside: a video without loss, `frame-00000.png` and on; or layers.

Those are `layer-0.png` and on, with alpha.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hydrarun.core.errors import UsageError
from hydrarun.core.files import write_flushed
from hydrarun.outputs.media.png import encode_png, read_png

MAX_BYTES = 2**31  # of one decoded video that is read: about 770 frames of 1280x720

#: what a file of a folder begins with, by `output.format`, and the digits of its number at least
STEMS = {"frames": ("frame", 5), "layers": ("layer", 1)}

NAME = re.compile(r"frame-(\d{5,})\.png|layer-(\d+)\.png")


def frame_file_name(number: int, output_format: str = "frames") -> str:
    """The file name of a frame or layer, counted from 0."""
    stem, digits = STEMS[output_format]
    return f"{stem}-{number:0{digits}d}.png"


def write_frames(
    folder: Path, pixels: np.ndarray, texts: Sequence[Mapping[str, str]], output_format: str = "frames"
) -> None:
    """Write `pixels` (uint8 [F, H, W, 3], or [L, H, W, 4]) as the files of `folder`; `texts`: the chunks of each.

    All or nothing: the folder appears when its last frame is on the disk, in the place of an older one.
    """
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent) as temporary:
        new = Path(temporary, "new")
        new.mkdir()
        for number, (frame, text) in enumerate(zip(pixels, texts, strict=True)):
            write_flushed(new / frame_file_name(number, output_format), encode_png(frame, text))
        if folder.exists():
            os.replace(folder, Path(temporary, "old"))
        os.replace(new, folder)


def read_frames(folder: Path) -> tuple[np.ndarray, dict[str, Any] | None]:
    """The frames (uint8 [F, H, W, 3]) or layers ([L, H, W, 4]) of a folder by their numbers, and the first's recipe.

    The folder may be a stranger's: everything that can be wrong with it is a `UsageError` of one line.
    """
    try:
        entries = os.listdir(folder)
    except OSError as error:
        raise UsageError(f"{folder}: {error.strerror}") from None
    matches = [match for match in map(NAME.fullmatch, entries) if match]
    numbers = {"frames": [match[1] for match in matches], "layers": [match[2] for match in matches]}
    found = {form: sorted(int(one) for one in own if one) for form, own in numbers.items() if any(own)}
    if not found:
        first_frame, first_layer = frame_file_name(0), frame_file_name(0, "layers")
        raise UsageError(f"{folder}: holds no {first_frame} and no {first_layer}, as folders that can be read do")
    form = next(iter(found))
    files = [folder / frame_file_name(number, form) for number in found[form]]
    return stack_frames(folder, (read_png(file)[0] for file in files)), read_png(files[0])[1]


def stack_frames(path: Path, frames: Iterable[np.ndarray]) -> np.ndarray:
    """One array [F, H, W, 3] of frames (uint8 [H, W, 3], layers with alpha) that are made one by one.

    Raises UsageError, naming `path`, as soon as they are too many bytes or not of one size.
    """
    data, shape = bytearray(), None
    for frame in frames:
        shape = shape or frame.shape
        if frame.shape != shape:
            raise UsageError(f"{path}: refused, its frames are not all of one size")
        if len(data) + frame.nbytes > MAX_BYTES:
            raise UsageError(f"{path}: refused, more than {MAX_BYTES} bytes of frames")
        data += frame.tobytes()
    if shape is None:
        raise UsageError(f"{path}: holds no frames")
    return np.frombuffer(data, np.uint8).reshape(-1, *shape)
