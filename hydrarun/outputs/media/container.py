"""Opens untrusted media files that libav decodes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, TypeVar

import av

from hydrarun.core.errors import UsageError

T = TypeVar("T")


def read_container(path: Path, kind: str, decode: Callable[[Path, BinaryIO], T]) -> T:
    """Open the file and return the result of `decode`. `kind` names the format in error messages.

    The file is untrusted: raises a one-line UsageError for anything wrong with it.
    """
    try:
        with open(path, "rb") as file:
            return decode(path, file)
    except av.FFmpegError as error:  # before OSError, which some of them also are
        raise UsageError(f"{path}: damaged {kind} file: {error.strerror}") from None
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
