"""Opening files that libav reads: a stranger's may be anything."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, TypeVar

import av

from hydrarun.core.errors import UsageError

T = TypeVar("T")


def read_container(path: Path, kind: str, decode: Callable[[Path, BinaryIO], T]) -> T:
    """What `decode` makes of the open file, called `kind` in sentences.

    Everything that can be wrong with it is a `UsageError` of one line.
    """
    try:
        with open(path, "rb") as file:
            return decode(path, file)
    except av.FFmpegError as error:  # before OSError, which some of them also are
        raise UsageError(f"{path}: damaged {kind} file: {error.strerror}") from None
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
