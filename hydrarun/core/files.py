"""Opens files that may come from a stranger, and writes files atomically."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

#: most bytes of a text that a user writes or that belongs to a checkpoint: prompts, configs, tokenizers
MAX_TEXT_BYTES = 2**28

BLOCK = 2**20

_KINDS = (
    (stat.S_ISDIR, "a folder, not a file"),
    (stat.S_ISFIFO, "a pipe, not a regular file"),
    (stat.S_ISSOCK, "a socket, not a regular file"),
)


def expand_home(path: str | Path) -> Path:
    """Return the path with `~` as the home folder. The name of an unknown user stays."""
    return Path(os.path.expanduser(path))


def resolve_path(path: str | Path) -> Path:
    """Return the absolute path without `~` and links. A link loop stays."""
    return Path(os.path.realpath(os.path.expanduser(path)))


def open_file(path: str | Path, most: int | None = None, buffering: int = -1) -> BinaryIO:
    """Open a regular file for reading, without ever waiting: a pipe or a device may never end.

    `most`: maximum size in bytes. Raises `OSError`, always with `strerror`, for anything else than a readable regular
    file of at most that size. The opened file itself is checked, so that nobody can exchange it in between.
    """
    file = os.fdopen(_open_regular(path, os.O_RDONLY), "rb", buffering)
    size = os.fstat(file.fileno()).st_size
    if most is not None and size > most:
        file.close()
        raise _too_large(path, most)
    return file


def open_lock(path: str | Path) -> BinaryIO:
    """Open or create a regular file to lock it. Raises `OSError` as `open_file` does."""
    return os.fdopen(_open_regular(path, os.O_RDWR | os.O_CREAT), "r+b")


def read_file(path: str | Path, most: int) -> bytes:
    """Return the content of a regular file. Raises `OSError` as `open_file` does, also for a file that grows."""
    with open_file(path, most) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise _too_large(path, most)
    return data


def compute_sha256(path: str | Path, count: Callable[[int], None] = lambda _: None) -> str:
    """Return the sha256 of a regular file's content. `count` receives the numbers of bytes read. Raises `OSError`."""
    with open_file(path, buffering=0) as file:
        return _compute_digest(hashlib.sha256(), file, count)


def compute_git_sha1(path: str | Path, count: Callable[[int], None] = lambda _: None) -> str:
    """Return the hash by which git names a regular file's content. Arguments as for `compute_sha256`."""
    with open_file(path, buffering=0) as file:
        head = b"blob %d\0" % os.fstat(file.fileno()).st_size
        return _compute_digest(hashlib.sha1(head, usedforsecurity=False), file, count)


def find_file_problem(path: str | Path) -> str | None:
    """Return the reason why a path is no readable regular file, or None."""
    try:
        open_file(path).close()
    except OSError as error:
        return error.strerror
    return None


def write_flushed(path: Path, data: bytes) -> None:
    """Write `path` and flush it to disk before returning."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_atomically(path: Path, data: bytes) -> None:
    """Write `path` so that it is never seen half written, not even after a crash."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write_flushed(temporary, data)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _compute_digest(digest: Any, file: BinaryIO, count: Callable[[int], None]) -> str:
    block = memoryview(bytearray(BLOCK))
    while size := file.readinto(block):  # type: ignore[attr-defined]
        digest.update(block[:size])
        count(size)
    return digest.hexdigest()


def _open_regular(path: str | Path, flags: int) -> int:
    try:
        descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY, 0o666)
    except ValueError as error:  # a null character
        raise OSError(errno.EINVAL, str(error), str(path)) from None
    except OSError as error:
        if error.errno == errno.EISDIR:
            raise OSError(errno.EISDIR, "a folder, not a file", str(path)) from None
        if error.errno == errno.ENXIO:
            raise OSError(errno.EINVAL, "not a regular file", str(path)) from None
        raise
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        what = next((text for matches, text in _KINDS if matches(mode)), "a device, not a regular file")
        raise OSError(errno.EINVAL, what, str(path))
    return descriptor


def _too_large(path: str | Path, most: int) -> OSError:
    return OSError(errno.EFBIG, f"larger than {most} bytes", str(path))
