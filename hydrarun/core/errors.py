"""Errors that users see without a traceback, and suggestions for mistyped names."""

from __future__ import annotations

import difflib
import importlib.util
import re
import sys
import traceback
from collections.abc import Iterable

from hydrarun.core.printable import make_printable


class ReportedError(Exception):
    """An error that is printed without a traceback. Each argument is one line, and printable whatever it quotes."""

    def __str__(self) -> str:
        return "\n".join(make_printable(str(line)) for line in self.args)


class UsageError(ReportedError):
    """The user's mistake. The message is the whole line (or lines) to print; the command exits with 2."""


class RunError(ReportedError):
    """A run failed for a reason the user can act on (corrupt weights, NaN pictures…). Printed as is; exit code 1."""


class WriteError(RunError):
    """A file of a run cannot be written. The others cannot be, either, so the run ends."""


#: the most mistakes that one error lists; the others are counted
LISTED = 20


class OutOfMemoryError(RunError):
    """A device, or the machine, ran out of memory."""


#: torch's messages about host memory, which it raises as plain RuntimeErrors; the last one is about sizes above 2**63
HOST_MEMORY = ("can't allocate memory", "not enough memory", "Storage size calculation overflowed")


def is_host_memory_error(error: BaseException) -> bool:
    """Return whether host memory ran out: Python's and NumPy's MemoryError, or the error of torch's CPU allocator."""
    plain = isinstance(error, RuntimeError) and any(text in str(error) for text in HOST_MEMORY)
    return plain or isinstance(error, MemoryError)


#: what an import raises if torchvision was built for another torch: transformers needs it only if it is there
TORCHVISION = "the installed torchvision does not fit torch: install the one that belongs to it, or uninstall it"


def describe_import_error(error: BaseException) -> str:
    """Return the first line of a library's error, and the cause if it is a torchvision that does not fit torch."""
    first = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return f"{first}; {TORCHVISION}" if is_torchvision_error(error) else first


def is_torchvision_error(error: BaseException | None) -> bool:
    """Return whether importing an installed torchvision failed, which transformers may report as another error."""
    while error and not (
        isinstance(error, (ImportError, RuntimeError, AttributeError)) and "torchvision" in str(error)
    ):
        error = error.__cause__ or error.__context__
    return error is not None and importlib.util.find_spec("torchvision") is not None


def make_host_memory_error(error: BaseException, phase: str = "") -> OutOfMemoryError:
    """Return the error to raise when host memory runs out, in a phase of a run if given."""
    where = f" in {phase}" if phase else ""
    size = re.search(r"allocate (\d+ bytes|[\d.]+ \wiB)", str(error))
    wanted = f", {size[1]} more were asked for" if size else ""
    return OutOfMemoryError(f"out of memory{where}: on the host{wanted}; `hydrarun plan` shows settings that fit")


def raise_mistakes(mistakes: Iterable[str]) -> None:
    """Raise UsageError if there are any mistakes: a line for each distinct one up to `LISTED`, then a count."""
    different = list(dict.fromkeys(mistakes))
    if different:
        more = [f"… and {len(different) - LISTED} more"] if len(different) > LISTED else []
        raise UsageError(*different[:LISTED], *more)


def find_closest(name: str, names: Iterable[str]) -> str | None:
    """Return the most similar of `names`, as a whole or by one word (`steps`: `num_inference_steps`), or None."""

    def likeness(candidate: str) -> tuple[float, float]:
        whole, *words = (_match_ratio(name, word) for word in (candidate, *candidate.split("_")))
        return max(whole, *words), whole

    best = max(sorted(names), key=likeness, default=None)
    return best if best is not None and likeness(best)[0] >= 0.6 else None


def _match_ratio(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()


def suggest_name(name: str, names: Iterable[str]) -> str:
    """Return ` Did you mean 'x'?` for the most similar of `names`, or "" if none is similar."""
    match = find_closest(name, names)
    return f" Did you mean '{match}'?" if match else ""


def require_at_least(key: str, value: int, least: int) -> int:
    """Return `value`. Raises `UsageError` naming the `key` if it is below `least`."""
    if value < least:
        raise UsageError(f"{key}: {value} is below {least}")
    return value


def report_error(error: Exception) -> int:
    """Print an exception, with its traceback if it is unexpected, and return its exit code."""
    if is_host_memory_error(error):
        error = make_host_memory_error(error)
    if not isinstance(error, ReportedError) and is_torchvision_error(error):
        error = RunError(describe_import_error(error))
    if not isinstance(error, ReportedError):
        traceback.print_exception(error)
        return 1
    print(error, file=sys.stderr)
    return 2 if isinstance(error, UsageError) else 1
