"""Safetensors files on disk: where each tensor is, and whether files are complete. Imports nothing heavy.

Format: 8 bytes little-endian header length, a JSON header `{tensor: {dtype, shape, data_offsets}}`, then the data
(https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hydrarun.core.errors import RunError

MAX_HEADER_BYTES = 100_000_000
SAMPLE_BYTES = 1024


@dataclass(frozen=True)
class Header:
    """The header of one file."""

    path: Path
    tensors: dict[str, dict[str, Any]]
    #: offset of the data in the file
    start: int

    @classmethod
    def read(cls, path: Path) -> Header:
        """Read a file's header. Raises `RunError` if the file is missing, truncated or not a safetensors file."""
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                    raise RunError(f"{path}: not a safetensors file, or cut off in its header ({size} bytes)")
                content = json.loads(file.read(length))
            tensors = {name: entry for name, entry in content.items() if name != "__metadata__"}
            end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
        except FileNotFoundError:
            raise RunError(f"{path}: no such file") from None
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            raise RunError(f"{path}: its header is damaged; download or copy the file again") from None
        if 8 + length + end != size:
            raise RunError(
                f"{path}: truncated or padded: {size} bytes, its header describes {8 + length + end};"
                " download or copy the file again"
            )
        return cls(path, tensors, 8 + length)

    def sample(self) -> bytes:
        """Return the header and the first bytes of every tensor."""
        content = [json.dumps(self.tensors, sort_keys=True).encode()]
        with self.path.open("rb") as file:
            for entry in sorted(self.tensors.values(), key=lambda entry: entry["data_offsets"]):
                first, end = entry["data_offsets"]
                file.seek(self.start + first)
                content.append(file.read(min(SAMPLE_BYTES, end - first)))
        return b"".join(content)


class Checkpoint:
    """The weights of one component: a folder with one file, or with shards and an index."""

    def __init__(self, folder: Path, stem: str = "diffusion_pytorch_model") -> None:
        """Raise `RunError` if the folder holds no safetensors weights under the names that diffusers writes."""
        self.folder = folder
        self.index_path = folder / f"{stem}.safetensors.index.json"
        self.single_path = folder / f"{stem}.safetensors"
        if not self.index_path.is_file() and not self.single_path.is_file():
            raise RunError(f"{folder}: no {stem}.safetensors and no index of shards; {self.present()}")

    def present(self) -> str:
        """Describe what the folder holds instead, for the error message."""
        if not self.folder.is_dir():
            return "the folder does not exist"
        if any(path.suffix in (".bin", ".pt", ".pth", ".ckpt") for path in self.folder.iterdir()):
            return "it holds pickle weights, which are never loaded: convert them to safetensors"
        return f"it holds {', '.join(sorted(path.name for path in self.folder.iterdir())) or 'nothing'}"

    @cached_property
    def headers(self) -> dict[str, Header]:
        """`{tensor: header of its file}`. Raises `RunError` naming file and tensor if index and files disagree."""
        if not self.index_path.is_file():
            header = Header.read(self.single_path)
            return dict.fromkeys(header.tensors, header)
        try:
            weight_map = json.loads(self.index_path.read_text())["weight_map"]
            names = {tensor: str(name) for tensor, name in weight_map.items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise RunError(f"{self.index_path}: not an index of safetensors shards") from None
        for name in set(names.values()):
            if Path(name).name != name:
                raise RunError(f"{self.index_path}: a shard must lie in the same folder, not at {name!r}")
        shards = {name: Header.read(self.folder / name) for name in sorted(set(names.values()))}
        for tensor, name in names.items():
            if tensor not in shards[name].tensors:
                raise RunError(f"{self.folder / name}: lacks {tensor!r}, which {self.index_path.name} puts there")
        return {tensor: shards[name] for tensor, name in names.items()}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """`{tensor: shape}`."""
        return {tensor: tuple(header.tensors[tensor]["shape"]) for tensor, header in self.headers.items()}

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        places = (header.tensors[tensor]["data_offsets"] for tensor, header in self.headers.items())
        return sum(end - first for first, end in places)


def check_folder(folder: Path) -> None:
    """Read the header of every safetensors file below `folder`. Raises `RunError` for the first damaged file."""
    for path in sorted(folder.rglob("*.safetensors")):
        Header.read(path)


def fingerprint_weights(folder: Path) -> str:
    """Return 16 hex digits that identify these weights: a hash of every JSON file and of a sample of every tensor.

    The sample is a tensor's first bytes: enough to detect retrained weights, fast at any size, no proof of equality.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".safetensors":
            content = Header.read(path).sample()
        elif path.suffix == ".json":
            content = path.read_bytes()
        else:
            continue
        digest.update(f"{path.relative_to(folder).as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:16]
