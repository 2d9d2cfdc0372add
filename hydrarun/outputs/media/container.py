"""Opens untrusted media files that libav decodes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, TypeVar

import av

from hydrarun.core.errors import UsageError
from hydrarun.core.files import open_file

T = TypeVar("T")

MAX_BYTES = 2**31  # of one file; the limits for what is decoded from it are lower


def read_container(path: Path, kind: str, decode: Callable[[Path, BinaryIO], T]) -> T:
    """Open the file and return the result of `decode`. `kind` names the format in error messages.

    The file is untrusted: raises a one-line UsageError for anything wrong with it.
    """
    try:
        with open_file(path, MAX_BYTES) as file:
            return decode(path, file)
    except av.FFmpegError as error:  # before OSError, which some of them also are
        raise UsageError(f"{path}: damaged {kind} file: {error.strerror}") from None
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
