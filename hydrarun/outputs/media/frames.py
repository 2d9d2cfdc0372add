"""Folders of PNG files, each with its recipe inside: the frames of a lossless video, or layers with alpha.

Frames are named `frame-00000.png`, `frame-00001.png`…, layers `layer-0.png`, `layer-1.png`….
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

MAX_BYTES = 2**31  # limit for one decoded video: about 770 frames of 1280x720

#: by `output.format`: the prefix of the file names, and the minimum number of digits
STEMS = {"frames": ("frame", 5), "layers": ("layer", 1)}

NAME = re.compile(r"frame-(\d{5,})\.png|layer-(\d+)\.png")


def frame_file_name(number: int, output_format: str = "frames") -> str:
    """Return the file name of a frame or layer; `number` counts from 0."""
    stem, digits = STEMS[output_format]
    return f"{stem}-{number:0{digits}d}.png"


def write_frames(
    folder: Path, pixels: np.ndarray, texts: Sequence[Mapping[str, str]], output_format: str = "frames"
) -> None:
    """Write `pixels` (uint8 [F, H, W, 3], or [L, H, W, 4]) as files of `folder`; `texts`: the text chunks of each file.

    Atomic: the folder appears, and replaces an older one, only when all its files are on disk.
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
    """Read the frames (uint8 [F, H, W, 3]) or layers ([L, H, W, 4]) of a folder by number, and the recipe of the first.

    The folder is untrusted: raises a one-line UsageError for anything wrong with it.
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
        raise UsageError(f"{folder}: holds no {first_frame} and no {first_layer}: not a folder of frames or layers")
    form = next(iter(found))
    files = [folder / frame_file_name(number, form) for number in found[form]]
    return stack_frames(folder, (read_png(file)[0] for file in files)), read_png(files[0])[1]


def stack_frames(path: Path, frames: Iterable[np.ndarray]) -> np.ndarray:
    """Stack frames (uint8 [H, W, 3]; layers [H, W, 4]) from an iterator into one array with a leading axis.

    Raises UsageError, naming `path`, as soon as the frames exceed `MAX_BYTES` or differ in size.
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
