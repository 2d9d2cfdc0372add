"""PNG files with their recipe inside, and untrusted PNG files."""

import json
import struct
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hydrarun.outputs.media import png, recipe_text
from tests.helpers.stranger import NASTY, refusal

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
refused = partial(refusal, png.read_png)


def write(folder: Path, **text: str) -> Path:
    path = folder / "picture.png"
    path.write_bytes(png.encode_png(PIXELS, text))
    return path


def chunk(keyword: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + keyword + data + struct.pack(">I", zlib.crc32(keyword + data))


def with_chunk(data: bytes, extra: bytes) -> bytes:
    """A PNG file with one more chunk, right after the header."""
    header_end = 8 + 25
    return data[:header_end] + extra + data[header_end:]


def test_pixels_and_metadata_come_back(tmp_path):
    metadata = {"prompt": NASTY, "seed": 2**63 - 1, "list": [1.5, None, True]}
    path = write(tmp_path, parameters=NASTY, hydrarun=json.dumps(metadata, ensure_ascii=False))
    pixels, read = png.read_png(path)
    assert np.array_equal(pixels, PIXELS)
    assert pixels.dtype == np.uint8
    assert read == metadata
    with Image.open(path) as image:
        assert image.text["parameters"] == NASTY


def test_a_file_without_the_chunk_has_no_metadata(tmp_path):
    pixels, metadata = png.read_png(write(tmp_path, parameters="a cat"))
    assert metadata is None
    assert np.array_equal(pixels, PIXELS)


def test_writing_refuses_what_reading_would(tmp_path):
    with pytest.raises(ValueError, match="'hydrarun' text chunk is larger"):
        png.encode_png(PIXELS, {"hydrarun": "x" * (recipe_text.MAX_TEXT_BYTES + 1)})


def test_no_such_file(tmp_path):
    assert "No such file" in refused(tmp_path / "none.png")


def test_a_folder(tmp_path):
    assert refused(tmp_path) == "a folder, not a file"


@pytest.mark.parametrize("data", [b"", b"GIF89a", b"not a picture at all"])
def test_not_a_png(tmp_path, data):
    path = tmp_path / "picture.png"
    path.write_bytes(data)
    assert "not a PNG" in refused(path)


def test_another_format_under_a_png_name(tmp_path):
    path = tmp_path / "picture.png"
    Image.fromarray(PIXELS).save(path, "JPEG")
    assert "not a PNG" in refused(path)


@pytest.mark.parametrize("kept", [20, 60, 500, -30])
def test_truncated(tmp_path, kept):
    path = write(tmp_path, hydrarun='{"a": 1}')
    path.write_bytes(path.read_bytes()[:kept])
    refused(path)


def test_flipped_bit(tmp_path):
    path = write(tmp_path, hydrarun='{"a": 1}')
    data = bytearray(path.read_bytes())
    data[-40] ^= 1  # inside the pixels: their checksum fails
    path.write_bytes(data)
    assert "damaged" in refused(path)


def test_decompression_bomb(tmp_path):
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    path = tmp_path / "bomb.png"
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    assert "pixels" in refused(path)


@pytest.mark.parametrize("compressed", [False, True])
def test_oversized_text(tmp_path, compressed):
    text = b'{"a": "' + b"x" * (recipe_text.MAX_TEXT_BYTES + 1) + b'"}'
    extra = (
        chunk(b"zTXt", b"hydrarun\0\0" + zlib.compress(text)) if compressed else chunk(b"tEXt", b"hydrarun\0" + text)
    )
    path = tmp_path / "picture.png"
    path.write_bytes(with_chunk(png.encode_png(PIXELS, {}), extra))
    refused(path)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", '"text"', "null", "[" * 100_000, '{"a": ' * 50_000])
def test_text_that_is_not_a_json_object(tmp_path, text):
    assert "not a JSON object" in refused(write(tmp_path, hydrarun=text))
