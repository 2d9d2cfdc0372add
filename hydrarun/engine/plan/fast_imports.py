"""Skips optional packages, which a plan never calls, while importing the libraries."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from hydrarun.core.errors import UsageError

#: optional dependencies of the libraries
NEVER_CALLED = ("torchao", "scipy")


@contextmanager
def skip_optional_imports() -> Iterator[None]:
    """Speed up importing the libraries, which takes most of a plan's time.

    Hides packages that the libraries import only if installed and that a plan never calls. Pauses the garbage
    collector.
    """
    hidden = [name for name in NEVER_CALLED if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    except ImportError as error:
        raise UsageError(
            f"plan: {error} A plan does not import {' and '.join(hidden)}, which this run seems to need"
        ) from None
    finally:
        if collects:
            gc.enable()
        for name in hidden:
            del sys.modules[name]
