"""Imports of the libraries without what a plan never calls."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from hydrarun.core.errors import UsageError

#: optional packages of the libraries
NEVER_CALLED = ("torchao", "scipy")


@contextmanager
def skip_optional_imports() -> Iterator[None]:
    """Makes importing the libraries faster, which takes most of a plan's time.

    Packages that they import only if installed, and a plan never calls, count as not installed. The garbage collector
    pauses.
    """
    hidden = [name for name in NEVER_CALLED if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    except ImportError as error:
        raise UsageError(
            f"plan: {error} A plan does without {' and '.join(hidden)}, which this seems to need"
        ) from None
    finally:
        if collects:
            gc.enable()
        for name in hidden:
            del sys.modules[name]
