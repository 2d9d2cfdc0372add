"""WAV files (16-bit PCM) that carry their recipe in two fields of the INFO list.

`ISBJ` (subject) holds the plain text and `ICMT` (comment) the JSON that `hydrarun replay` reads: the two text chunks of
our PNG files. docs/outputs.md documents both.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import av
import numpy as np

from hydrarun.core.errors import RunError, UsageError
from hydrarun.outputs.media import png
from hydrarun.outputs.media.container import read_container
from hydrarun.outputs.media.recipe_text import check_text_sizes, parse_recipe

TAGS = {"parameters": "ISBJ", png.CHUNK: "comment"}

MAX_BYTES = 2**30  # limit for the samples of one file: an hour and a half of stereo at 48 kHz

LAYOUTS = {1: "mono", 2: "stereo"}

BLOCK = 2**16  # samples per encoded frame


def encode_wav(samples: np.ndarray, rate: int, text: Mapping[str, str]) -> bytes:
    """Encode a WAV file. `samples`: int16 [samples, channels]; `rate`: in Hz; `text`: by keyword, as for `encode_png`.

    Raises RunError for more than two channels, ValueError for a text that `read_wav` would refuse.
    """
    if samples.shape[1] not in LAYOUTS:
        raise RunError(f"wav output takes one or two channels, not {samples.shape[1]}")
    check_text_sizes(text, "text")
    file = io.BytesIO()
    with av.open(file, "w", format="wav") as container:
        container.metadata.update({TAGS[keyword]: value for keyword, value in text.items()})
        write_samples(container, "pcm_s16le", samples, rate)
    return file.getvalue()


def write_samples(container: Any, codec: str, samples: np.ndarray, rate: int, **options: Any) -> None:
    """Encode samples into an open container as a stream with this codec."""
    layout = LAYOUTS[samples.shape[1]]
    stream = container.add_stream(codec, rate=rate, layout=layout, **options)
    for start in range(0, len(samples), BLOCK):
        packed = np.ascontiguousarray(samples[start : start + BLOCK]).reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(packed, format="s16", layout=layout)
        frame.sample_rate, frame.pts = rate, start
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def read_wav(path: Path) -> tuple[np.ndarray, dict[str, Any] | None]:
    """Read the samples, int16 [samples, channels], and the recipe in the comment, None if there is none.

    The file is untrusted: raises a one-line UsageError for anything wrong with it.
    """
    return read_container(path, "wav", _decode_wav)


def _decode_wav(path: Path, file: BinaryIO) -> tuple[np.ndarray, dict[str, Any] | None]:
    # an open file and an explicit format: libav tries no other format, playlist or network address
    head, length = file.read(12), file.seek(0, io.SEEK_END)
    if head[:4] != b"RIFF" or head[8:] != b"WAVE":
        raise UsageError(f"{path}: not a wav file, or damaged at its start")
    if int.from_bytes(head[4:8], "little") + 8 > length:
        raise UsageError(f"{path}: damaged wav file: cut short")
    file.seek(0)
    with av.open(file, format="wav", metadata_errors="replace") as opened:
        streams = opened.streams.audio
        if [stream.codec_context and stream.codec_context.name for stream in streams] != ["pcm_s16le"]:
            raise UsageError(f"{path}: refused, not a wav file of 16-bit PCM")
        record = parse_recipe(path, opened.metadata.get(TAGS[png.CHUNK]), "comment tag")
        return _decode_samples(path, opened, streams[0]), record


def _decode_samples(path: Path, container: Any, stream: Any) -> np.ndarray:
    channels, data = stream.codec_context.channels, bytearray()
    for frame in container.decode(stream):
        data += frame.to_ndarray().tobytes()
        if len(data) > MAX_BYTES:
            raise UsageError(f"{path}: refused, more than {MAX_BYTES} bytes of samples")
    samples = np.frombuffer(data, np.int16).reshape(-1, channels)
    if not len(samples) or len(samples) != stream.duration:
        raise UsageError(f"{path}: damaged wav file: {len(samples)} samples of {stream.duration}")
    return samples
