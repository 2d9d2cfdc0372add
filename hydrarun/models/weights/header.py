"""The header of a safetensors file: where each tensor is. Imports nothing heavy.

Format: 8 bytes little-endian header length, a JSON header `{tensor: {dtype, shape, data_offsets}}`, then the data
(https://huggingface.co/docs/safetensors). The file may come from a stranger: every entry is checked.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydrarun.core.errors import RunError
from hydrarun.core.files import open_file
from hydrarun.core.strict_json import parse_json

MAX_HEADER_BYTES = 100_000_000
SAMPLE_BYTES = 1024

#: bits of an element, by the format's names of dtypes
BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}

#: dtypes of weights; the others are integers, which mean nothing without their scales
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")

#: most dimensions of a tensor, and values above any size
MAX_DIMENSIONS = 16
MAX_SIZE = 2**63

COPY_AGAIN = "download or copy the file again"


@dataclass(frozen=True)
class Header:
    """The header of one file. The tensors' bytes follow each other without gaps."""

    path: Path
    tensors: dict[str, dict[str, Any]]
    #: offset of the data in the file
    start: int

    @classmethod
    def read(cls, path: Path) -> Header:
        """Read and check a file's header.

        Raises `RunError` if the file is missing, truncated or not a safetensors file, and naming the first tensor whose
        entry is invalid.
        """
        try:
            data, start, size = _read_bytes(path)
        except OSError as error:
            problem = "no such file" if isinstance(error, FileNotFoundError) else error.strerror
            raise RunError(f"{path}: {problem}") from None
        try:
            tensors = _parse_tensors(data)
            end = _check_places(tensors)
        except ValueError as error:
            raise RunError(f"{path}: its header is damaged: {error}; {COPY_AGAIN}") from None
        if start + end != size:
            raise RunError(
                f"{path}: truncated or padded: {size} bytes, its header describes {start + end}; {COPY_AGAIN}"
            )
        return cls(path, tensors, start)

    def require_float(self, name: str) -> None:
        """Raise `RunError` unless a tensor holds floating-point numbers of a dtype that can be read."""
        dtype = self.tensors[name]["dtype"]
        if dtype not in FLOATS:
            raise RunError(
                f"{self.path}: {name!r} has the dtype {dtype}, and weights are read as one of {', '.join(FLOATS)}; use"
                " the checkpoint that is not quantized, and quantization=… for 8-bit weights"
            )

    def sample(self) -> bytes:
        """Return the header and the first bytes of every tensor."""
        content = [json.dumps(self.tensors, sort_keys=True).encode()]
        with open_file(self.path) as file:
            for entry in sorted(self.tensors.values(), key=lambda entry: entry["data_offsets"]):
                first, end = entry["data_offsets"]
                file.seek(self.start + first)
                content.append(file.read(min(SAMPLE_BYTES, end - first)))
        return b"".join(content)


def _read_bytes(path: Path) -> tuple[bytes, int, int]:
    """Return the header's JSON, the offset of the data, and the size of the file."""
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise RunError(f"{path}: not a safetensors file, or cut off in its header ({size} bytes)")
        return file.read(length), 8 + length, size


def _parse_tensors(data: bytes) -> dict[str, dict[str, Any]]:
    content = parse_json(data)
    if not isinstance(content, dict):
        raise ValueError("not an object")
    content.pop("__metadata__", None)
    for name, entry in content.items():
        if problem := _find_entry_problem(entry):
            raise ValueError(f"{name[:200]!r} {problem}")
    return content


def _find_entry_problem(entry: Any) -> str | None:
    """Return what is wrong with the entry of a tensor, or None."""
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        return "lacks dtype, shape or data_offsets"
    dtype, shape, places = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        return f"has the dtype {str(dtype)[:20]!r}, which the format does not have"
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(map(_is_size, shape)):
        return "has a shape that is not a list of sizes"
    if not isinstance(places, list) or len(places) != 2 or not all(map(_is_size, places)) or places[0] > places[1]:
        return "has data_offsets that are not two increasing positions"
    if math.prod(shape) * BITS[dtype] != 8 * (places[1] - places[0]):
        return f"has data_offsets {places} that do not fit {dtype} of shape {shape}"
    return None


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MAX_SIZE


def _check_places(tensors: dict[str, dict[str, Any]]) -> int:
    """Return the number of bytes of all tensors. Raises ValueError if their bytes overlap or leave gaps."""
    end = 0
    for name, entry in sorted(tensors.items(), key=lambda item: item[1]["data_offsets"]):
        first, last = entry["data_offsets"]
        if first != end:
            how = "overlaps" if first < end else "leaves a gap after"
            raise ValueError(f"{name[:200]!r} {how} the tensor before it")
        end = last
    return end
