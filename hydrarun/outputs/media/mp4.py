"""MP4 files (H.264) that carry their recipe in two tags of the container.

`description` holds the plain text and `comment` the JSON that `hydrarun replay` reads: the two text chunks of our PNG
files. docs/outputs.md documents both.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace

from hydrarun.core.errors import RunError, UsageError
from hydrarun.outputs.media import png
from hydrarun.outputs.media.container import read_container
from hydrarun.outputs.media.frames import stack_frames
from hydrarun.outputs.media.recipe_text import check_text_sizes, parse_recipe

TAGS = {"parameters": "description", png.CHUNK: "comment"}

CRF = "17"  # constant quality; 17-18 is visually lossless

BT709 = 1  # HDTV colours, code point of ITU-T H.273


def encode_mp4(pixels: np.ndarray, fps: int, text: Mapping[str, str]) -> bytes:
    """Encode an MP4 file. `pixels`: uint8 [F, H, W, 3], H and W even; `text`: by keyword, as for `encode_png`.

    Raises RunError for an odd height or width, ValueError for a text that `read_mp4` would refuse.
    """
    height, width = pixels.shape[1:3]
    if height % 2 or width % 2:
        raise RunError(f"mp4 needs an even width and height, not {width}x{height}; output.format=frames takes any size")
    check_text_sizes(text, "text")
    # a file on disk: moving the index to the front (so that browsers play it while loading) reads it again
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "video.mp4")
        with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
            container.metadata.update({TAGS[keyword]: value for keyword, value in text.items()})
            stream = _add_h264_stream(container, width, height, fps)
            for number, frame in enumerate(pixels):
                container.mux(stream.encode(_to_yuv(frame, number)))
            container.mux(stream.encode(None))
        return path.read_bytes()


def _add_h264_stream(container: Any, width: int, height: int, fps: int) -> Any:
    stream = container.add_stream("libx264", rate=fps, options={"crf": CRF})
    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"  # the format that every player supports
    # stored in the file: without it, players guess the colour matrix by the size, and their guesses differ
    codec = stream.codec_context
    codec.colorspace, codec.color_range = Colorspace.ITU709, ColorRange.MPEG
    codec.color_primaries = codec.color_trc = BT709
    return stream


def _to_yuv(frame: np.ndarray, number: int) -> av.VideoFrame:
    rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
    yuv = rgb.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
    yuv.pts = number
    return yuv


def read_mp4(path: Path) -> tuple[np.ndarray, dict[str, Any] | None]:
    """Decode the (lossy) frames, uint8 [F, H, W, 3], and the recipe in the `comment` tag, None if there is none.

    The file is untrusted: raises a one-line UsageError for anything wrong with it.
    """
    return read_container(path, "mp4", _decode_mp4)


def _decode_mp4(path: Path, file: BinaryIO) -> tuple[np.ndarray, dict[str, Any] | None]:
    # an open file and an explicit format: libav tries no other format, playlist or network address
    if file.read(8)[4:] != b"ftyp":
        raise UsageError(f"{path}: not an mp4 file, or damaged at its start")
    file.seek(0)
    with av.open(file, format="mp4", metadata_errors="replace") as opened:
        video = opened.streams.video
        codecs = [stream.codec_context and stream.codec_context.name for stream in video]  # no context: unknown codec
        if codecs != ["h264"]:
            raise UsageError(f"{path}: refused, not an mp4 file with one H.264 video in it")
        record = parse_recipe(path, opened.metadata.get(TAGS[png.CHUNK]), "comment tag")
        return stack_frames(path, _decode_frames(path, opened, video[0])), record


def _decode_frames(path: Path, container: Any, stream: Any) -> Iterator[np.ndarray]:
    stream.codec_context.options = {"err_detect": "explode"}  # otherwise the decoder conceals damage
    count = 0
    for count, frame in enumerate(container.decode(stream), 1):  # noqa: B007 - the last count is compared below
        yield frame.to_ndarray(format="rgb24")
    if stream.frames and count != stream.frames:
        raise UsageError(f"{path}: damaged mp4 file: {count} of its {stream.frames} frames can be read")
