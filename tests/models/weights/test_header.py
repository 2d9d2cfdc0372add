"""The header of a safetensors file is checked entry by entry, before anything is read by it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from hydrarun.core.errors import RunError
from hydrarun.models.weights.header import Header

GOOD = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def write(path: Path, header: object, size: int = 24) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))
    return path


@pytest.fixture
def file(tmp_path) -> Path:
    return tmp_path / "model.safetensors"


def refusal(path: Path) -> str:
    with pytest.raises(RunError) as caught:
        Header.read(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert len(message) < len(str(path)) + 500
    return message


def test_what_fits(file):
    second = {"dtype": "I8", "shape": [], "data_offsets": [24, 25]}
    empty = {"dtype": "BF16", "shape": [0, 7], "data_offsets": [25, 25]}
    header = Header.read(write(file, {"b": second, "a": GOOD, "c": empty, "__metadata__": {"format": "pt"}}, 25))
    assert header.tensors == {"a": GOOD, "b": second, "c": empty}
    assert header.start == file.stat().st_size - 25


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data_offsets": ["0", "24"]}, "not two increasing positions"),
        ({"data_offsets": [0.0, 24.0]}, "not two increasing positions"),
        ({"data_offsets": [0, 24, 24]}, "not two increasing positions"),
        ({"data_offsets": [0]}, "not two increasing positions"),
        ({"data_offsets": "ab"}, "not two increasing positions"),
        ({"data_offsets": {"0": 0, "1": 24}}, "not two increasing positions"),
        ({"data_offsets": None}, "not two increasing positions"),
        ({"data_offsets": [False, 24]}, "not two increasing positions"),
        ({"data_offsets": [-4, 20]}, "not two increasing positions"),
        ({"data_offsets": [24, 0]}, "not two increasing positions"),
        ({"data_offsets": [0, 2**70]}, "not two increasing positions"),
        ({"data_offsets": [4, 28]}, "leaves a gap"),
        ({"shape": [2, 4]}, "do not fit F32 of shape [2, 4]"),
        ({"shape": [3, 2, 0]}, "do not fit"),
        ({"shape": [2.0, 3]}, "not a list of sizes"),
        ({"shape": [True, 6]}, "not a list of sizes"),
        ({"shape": [-2, -3]}, "not a list of sizes"),
        ({"shape": [2**64, 0]}, "not a list of sizes"),
        ({"shape": "23"}, "not a list of sizes"),
        ({"shape": 6}, "not a list of sizes"),
        ({"shape": [1] * 100 + [6]}, "not a list of sizes"),
        ({"dtype": "F16"}, "do not fit F16"),
        ({"dtype": "F31"}, "dtype 'F31', which the format does not have"),
        ({"dtype": ["F32"]}, "which the format does not have"),
        ({"dtype": "x" * 10_000}, "which the format does not have"),
    ],
    ids=str,
)
def test_an_entry_that_does_not_fit_is_named(file, change, message):
    said = refusal(write(file, {"layer.weight": GOOD | change}))
    assert "its header is damaged: 'layer.weight' " in said
    assert message in said


@pytest.mark.parametrize("key", ["dtype", "shape", "data_offsets"])
def test_an_entry_that_lacks_something(file, key):
    entry = {name: value for name, value in GOOD.items() if name != key}
    assert "'a' lacks dtype, shape or data_offsets" in refusal(write(file, {"a": entry}))


@pytest.mark.parametrize("entry", [None, 5, "text", [], ["dtype", "shape", "data_offsets"]], ids=str)
def test_an_entry_that_is_no_object(file, entry):
    assert "'a' lacks" in refusal(write(file, {"a": entry}))


def test_tensors_share_no_bytes(file):
    half = {"dtype": "F32", "shape": [4], "data_offsets": [8, 24]}
    assert "'b' overlaps the tensor before it" in refusal(write(file, {"a": GOOD, "b": half}))
    assert "overlaps" in refusal(write(file, {"a": GOOD, "b": GOOD}))


def test_tensors_cover_the_file(file):
    behind = {"dtype": "F32", "shape": [1], "data_offsets": [28, 32]}
    assert "'b' leaves a gap" in refusal(write(file, {"a": GOOD, "b": behind}, 32))
    assert "truncated or padded" in refusal(write(file, {"a": GOOD}, 25))
    assert "truncated or padded" in refusal(write(file, {"a": GOOD}, 23))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[" * 100_000, "nested more than"),
        (b'{"a":' * 100_000, "nested more than"),
        (b"[]", "not an object"),
        (b"\xff\xfe", "not UTF-8"),
        (b"{" + b" " * 20, "damaged"),
        (b'{"a": 1, "a": 2}', "'a' is set twice"),
        (b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 24]}}', "NaN is not a number"),
        (b'{"a": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 24]}}', "too large a number"),
        (b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 24]}}', "too many digits"),
        (b'{"\\ud800": 1}', "surrogate"),
    ],
    ids=["lists", "objects", "a list", "bytes", "cut off", "twice", "NaN", "infinity", "digits", "surrogate"],
)
def test_a_header_that_is_no_plain_object(file, text, message):
    assert message in refusal(write(file, text))


def test_what_is_no_file(file, tmp_path):
    assert refusal(file).endswith("no such file")
    file.mkdir()
    assert refusal(file).endswith("a folder, not a file")
    for name, make in (("pipe", os.mkfifo), ("loop", lambda path: path.symlink_to(path))):
        make(tmp_path / name)
        assert refusal(tmp_path / name)
    (tmp_path / "device").symlink_to("/dev/zero")
    assert refusal(tmp_path / "device").endswith("a device, not a regular file")


def test_a_huge_sparse_file(file):
    with file.open("wb") as opened:
        opened.truncate(8 * 2**30)
    assert "not a safetensors file" in refusal(file)
    with file.open("r+b") as opened:
        opened.write((2**26).to_bytes(8, "little"))
    assert "its header is damaged" in refusal(file)
