"""Ends a run on SIGTERM and SIGHUP as Ctrl-C does: what was made is kept, and run.json says how it ended."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

#: signals that ask a process to end; SIGINT raises KeyboardInterrupt already
ENDING = (signal.SIGTERM, signal.SIGHUP)


#: seconds in which a further signal is taken for the same request
PAUSE = 1.0


class Interrupted(KeyboardInterrupt):
    """A signal asked this process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def get_interruption_code(error: KeyboardInterrupt) -> int:
    """Return the exit code, as in a shell: 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP."""
    return 128 + (error.number if isinstance(error, Interrupted) else signal.SIGINT)


@contextmanager
def interrupt_on_signals() -> Iterator[None]:
    """Raise `Interrupted` in the block on a signal of `ENDING`, once a second: others may follow at once.

    A signal that this process ignores (`nohup`) or handles otherwise stays as it is. Only the main thread may set
    handlers; in others the block runs unchanged.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    own = [number for number in ENDING if signal.getsignal(number) is signal.SIG_DFL]
    last = -PAUSE

    def end(number: int, _: Any) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < PAUSE:
            return
        last = now
        discard_lost_terminal()
        raise Interrupted(number)

    for number in own:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in own:
            signal.signal(number, signal.SIG_DFL)


def discard_lost_terminal() -> None:
    """Send stdout and stderr to the null device if their terminal is gone: writing to it would fail from now on."""
    for descriptor in (1, 2):
        try:
            os.write(descriptor, b"")
        except OSError:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, descriptor)
            os.close(null)
