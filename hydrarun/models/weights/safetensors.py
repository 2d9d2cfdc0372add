"""The safetensors files of a checkpoint on disk, and whether they are complete. Imports nothing heavy."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection
from functools import cached_property
from pathlib import Path
from typing import Any

from hydrarun.core.errors import RunError
from hydrarun.core.files import MAX_TEXT_BYTES, open_file, read_file
from hydrarun.core.strict_json import INFINITE, read_json, read_json_object
from hydrarun.models.weights.header import Header

#: files that the libraries read, apart from weights: configs, tokenizers and chat templates
LIBRARY_FILES = (".json", ".txt", ".model", ".jinja")

#: larger JSON files are vocabularies, which take seconds to parse; their library refuses damaged ones
MAX_CONFIG_BYTES = 2**20


class Checkpoint:
    """The weights of one component: a folder with one file, or with shards and an index."""

    def __init__(self, folder: Path, stem: str = "diffusion_pytorch_model") -> None:
        """Raise `RunError` if the folder holds no safetensors weights under the names that diffusers writes."""
        self.folder = folder
        self.index_path = folder / f"{stem}.safetensors.index.json"
        self.single_path = folder / f"{stem}.safetensors"
        #: whether the weights are shards; any file of that name counts, so that reading it reports what it is instead
        self.sharded = os.path.lexists(self.index_path)
        if not self.sharded and not os.path.lexists(self.single_path):
            raise RunError(f"{folder}: no {stem}.safetensors and no index of shards; {self.present()}")

    def present(self) -> str:
        """Describe what the folder holds instead, for the error message."""
        try:
            names = sorted(os.listdir(self.folder))
        except FileNotFoundError:
            return "the folder does not exist"
        except OSError as error:
            return f"the folder cannot be read: {error.strerror}"
        if any(name.endswith((".bin", ".pt", ".pth", ".ckpt")) for name in names):
            return "it holds pickle weights, which are never loaded: convert them to safetensors"
        return f"it holds {', '.join(names) or 'nothing'}"

    @cached_property
    def headers(self) -> dict[str, Header]:
        """`{tensor: header of its file}`. Raises `RunError` naming file and tensor if index and files disagree."""
        if not self.sharded:
            header = Header.read(self.single_path)
            return dict.fromkeys(header.tensors, header)
        names = self._read_index()
        shards = {name: Header.read(self.folder / name) for name in sorted(set(names.values()))}
        for tensor, name in names.items():
            if tensor not in shards[name].tensors:
                raise RunError(f"{self.folder / name}: lacks {tensor!r}, which {self.index_path.name} puts there")
        return {tensor: shards[name] for tensor, name in names.items()}

    def _read_index(self) -> dict[str, str]:
        """Return `{tensor: name of its file}`."""
        weight_map = read_checkpoint_json(self.index_path).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise RunError(f"{self.index_path}: not an index of safetensors shards")
        for name in set(weight_map.values()):
            if Path(name).name != name or "\0" in name:
                raise RunError(f"{self.index_path}: a shard must lie in the same folder, not at {name!r}")
        return weight_map

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """`{tensor: shape}`."""
        return {tensor: tuple(header.tensors[tensor]["shape"]) for tensor, header in self.headers.items()}

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        places = (header.tensors[tensor]["data_offsets"] for tensor, header in self.headers.items())
        return sum(end - first for first, end in places)


def read_checkpoint_json(path: Path, constants: Collection[str] = ()) -> dict[str, Any]:
    """Read a JSON object of a checkpoint. Raises `RunError`, which names the file."""
    try:
        return read_json_object(path, MAX_TEXT_BYTES, constants)
    except FileNotFoundError:
        raise RunError(f"{path}: no such file") from None
    except OSError as error:
        raise RunError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise RunError(f"{path}: not a JSON object: {error}") from None


def check_folder(folder: Path) -> None:
    """Read the header of every safetensors file of a checkpoint, and check that a library can read its other files.

    Raises `RunError` for the first file that is damaged, or that is no regular file.
    """
    check_library_files(folder)
    for path in list_files(folder, (".safetensors",)):
        Header.read(path)


def check_library_files(folder: Path) -> None:
    """Raise `RunError` for the first file of a checkpoint, apart from weights, that a library could not read."""
    for path in list_files(folder, LIBRARY_FILES):
        try:
            with open_file(path, MAX_TEXT_BYTES) as file:
                size = os.fstat(file.fileno()).st_size
            settings = "config" in path.name or path.name == "model_index.json"  # at any size: classes take them
            if path.suffix == ".json" and (settings or size <= MAX_CONFIG_BYTES):
                read_json(path, MAX_TEXT_BYTES, INFINITE)
        except OSError as error:
            raise RunError(f"{path}: {error.strerror}") from None
        except ValueError as error:
            raise RunError(f"{path}: not JSON: {error}") from None


def list_files(folder: Path, suffixes: Collection[str]) -> list[Path]:
    """List the files in a checkpoint and up to two folders deeper, links to folders included."""
    found = (path for pattern in ("*", "*/*", "*/*/*") for path in folder.glob(pattern))
    return sorted(path for path in found if path.suffix in suffixes)


def fingerprint_weights(folder: Path) -> str:
    """Return 16 hex digits that identify these weights: a hash of every JSON file and of a sample of every tensor.

    The sample is a tensor's first bytes: enough to detect retrained weights, fast at any size, no proof of equality.
    Raises `RunError` for a file that cannot be read.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix not in (".safetensors", ".json"):
            continue
        try:
            content = Header.read(path).sample() if path.suffix == ".safetensors" else read_file(path, MAX_TEXT_BYTES)
        except OSError as error:
            raise RunError(f"{path}: {error.strerror}") from None
        digest.update(f"{path.relative_to(folder).as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:16]
