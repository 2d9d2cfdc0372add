"""MP4 files with their recipe inside, and untrusted MP4 files."""

import json
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest

from hydrarun.core.errors import RunError, UsageError
from hydrarun.outputs.media import frames, mp4, recipe_text
from tests.helpers.stranger import NASTY, refusal

refused = partial(refusal, mp4.read_mp4)


def gradient(count: int = 7, height: int = 64, width: int = 96) -> np.ndarray:
    """Smooth, changing frames of saturated colours: [F, H, W, 3]."""
    x, y = np.linspace(0, 255, width), np.linspace(0, 255, height)
    red, green = np.broadcast_to(x, (height, width)), np.broadcast_to(y[:, None], (height, width))
    blue = [np.full((height, width), 255 * k / count) for k in range(count)]
    return np.stack([np.stack([red, green, plane], -1) for plane in blue]).astype(np.uint8)


PIXELS = gradient()


def write(folder: Path, data: bytes | None = None, **text: str) -> Path:
    path = folder / "video.mp4"
    path.write_bytes(mp4.encode_mp4(PIXELS, 16, text) if data is None else data)
    return path


# --- writing ---------------------------------------------------------------------------------------------------------


def test_frames_come_back_nearly_and_in_their_colours(tmp_path):
    pixels, record = mp4.read_mp4(write(tmp_path))
    assert (pixels.shape, pixels.dtype, record) == (PIXELS.shape, np.uint8, None)
    difference = np.abs(pixels.astype(int) - PIXELS)
    assert difference.max() <= 12
    assert difference.mean() < 2.5  # another colour matrix would be 10 off


@pytest.mark.parametrize(("count", "fps"), [(1, 24), (2, 1), (5, 16), (30, 30)])
def test_every_frame_at_a_constant_rate(tmp_path, count, fps):
    path = write(tmp_path, mp4.encode_mp4(gradient(count, 16, 16), fps, {}))
    assert len(mp4.read_mp4(path)[0]) == count
    with av.open(str(path)) as container:
        (stream,) = container.streams
        times = [frame.pts * frame.time_base for frame in container.decode(stream)]
        assert (stream.frames, stream.average_rate) == (count, fps)
    assert times == [Fraction(k, fps) for k in range(count)]


def test_it_says_what_players_must_know(tmp_path):
    path = write(tmp_path)
    with av.open(str(path)) as container:
        codec = container.streams.video[0].codec_context
        assert (codec.name, codec.pix_fmt) == ("h264", "yuv420p")
        assert {int(codec.colorspace), int(codec.color_primaries), int(codec.color_trc)} == {mp4.BT709}
        assert int(codec.color_range) == 1  # 16 to 235, as in television
    data = path.read_bytes()
    assert 0 < data.find(b"moov") < data.find(b"mdat")  # the index comes first


def test_long_texts_in_any_writing_come_back(tmp_path):
    metadata = {"prompt": NASTY * 3000, "seed": 2**63 - 1, "list": [1.5, None, True]}
    text = json.dumps(metadata, ensure_ascii=False)
    assert len(text.encode()) > 100_000
    path = write(tmp_path, parameters=NASTY, hydrarun=text)
    assert mp4.read_mp4(path)[1] == metadata
    with av.open(str(path)) as container:
        assert container.metadata["comment"] == text
        assert container.metadata["description"] == NASTY


def test_no_texts_no_tags(tmp_path):
    with av.open(str(write(tmp_path))) as container:
        assert not {"comment", "description"} & set(container.metadata)


def test_writing_refuses_what_reading_would():
    with pytest.raises(ValueError, match="'hydrarun' text is larger than"):
        mp4.encode_mp4(PIXELS, 16, {"hydrarun": "x" * (recipe_text.MAX_TEXT_BYTES + 1)})


@pytest.mark.parametrize(("height", "width"), [(15, 16), (16, 15)])
def test_an_odd_size_is_refused(height, width):
    said = f"mp4 needs an even width and height, not {width}x{height}; output.format=frames takes any size"
    with pytest.raises(RunError, match=said):
        mp4.encode_mp4(gradient(2, height, width), 16, {})


# --- untrusted files -------------------------------------------------------------------------------------------------


def test_no_such_file(tmp_path):
    assert refused(tmp_path / "none.mp4") == "No such file or directory"


@pytest.mark.parametrize("data", [b"", b"GIF89a", b"#EXTM3U\nhttp://127.0.0.1:1/a.mp4\n", b"ffconcat version 1.0\n"])
def test_not_an_mp4(tmp_path, data):
    assert refused(write(tmp_path, data)) == "not an mp4 file, or damaged at its start"


def test_only_the_mp4_reader_is_tried(tmp_path):
    playlist = b"\0\0\0\x08ftyp\n#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:1/a.ts\n"
    assert refused(write(tmp_path, playlist)).startswith("damaged mp4 file: ")


@pytest.mark.parametrize("kept", [8, 60, 500, 2000, -1000, -20])
def test_truncated(tmp_path, kept):
    path = write(tmp_path, hydrarun='{"a": 1}')
    path.write_bytes(path.read_bytes()[:kept])
    refused(path)


def test_damage_inside_the_frames_is_not_painted_over(tmp_path):
    path = write(tmp_path)
    data = bytearray(path.read_bytes())
    data[-200:-100] = bytes(100)
    path.write_bytes(data)
    assert refused(path).startswith("damaged mp4 file: ")


def test_any_flipped_bit_is_a_readable_file_or_one_line(tmp_path):
    data = mp4.encode_mp4(gradient(3, 16, 16), 16, {"hydrarun": "{}"})
    random = np.random.default_rng(0)
    said = []
    for place, bit in zip(random.integers(0, len(data), 60), random.integers(0, 8, 60), strict=True):
        damaged = bytearray(data)
        damaged[place] ^= 1 << bit
        path = write(tmp_path, bytes(damaged))
        try:
            mp4.read_mp4(path)
        except UsageError as error:
            said.append(str(error))
    assert said
    assert not [text for text in said if "\n" in text or not text.startswith(str(path))]


def test_too_many_bytes_stop_the_decoding(tmp_path, monkeypatch):
    monkeypatch.setattr(frames, "MAX_BYTES", PIXELS.nbytes - 1)
    assert refused(write(tmp_path)) == f"refused, more than {PIXELS.nbytes - 1} bytes of frames"


@pytest.mark.parametrize("codecs", [("mpeg4",), ("aac",), ("libx264", "libx264"), ("aac", "mpeg4")])
def test_anything_but_one_h264_video(tmp_path, codecs):
    path = tmp_path / "video.mp4"
    with av.open(str(path), "w") as container:
        streams = [container.add_stream(codec, rate=48_000 if codec == "aac" else 16) for codec in codecs]
        for stream in container.streams.video:
            stream.width, stream.height, stream.pix_fmt = 16, 16, "yuv420p"
        for stream in streams:
            sound = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), format="fltp", layout="stereo")
            sound.sample_rate = 48_000
            packets = stream.encode(sound if stream.type == "audio" else av.VideoFrame(16, 16, "yuv420p"))
            container.mux([*packets, *stream.encode(None)])
    assert refused(path) == "refused, not an mp4 file with one H.264 video in it"


def test_oversized_text(tmp_path, monkeypatch):
    path = write(tmp_path, hydrarun=json.dumps({"a": "猫" * 100}, ensure_ascii=False))
    monkeypatch.setattr("hydrarun.outputs.media.recipe_text.MAX_TEXT_BYTES", 300)
    assert refused(path) == "refused, its comment tag is larger than 300 bytes"


@pytest.mark.parametrize("text", ["{", "[1, 2]", '"text"', "null", "made by another tool", "[" * 100_000])
def test_a_comment_that_is_not_a_json_object(tmp_path, text):
    assert refused(write(tmp_path, hydrarun=text)).startswith("its comment tag is not a JSON object")
