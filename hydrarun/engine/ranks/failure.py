"""The failure of a rank, as it travels to the driver."""

from __future__ import annotations

import traceback
from typing import Any, NamedTuple

from hydrarun.core.errors import ReportedError, RunError, UsageError, WriteError

#: the longest text of a failure in characters; of a longer traceback the end is kept
MAX_TEXT = 8000

#: the exceptions that a driver raises, by name
KINDS: dict[str, type[ReportedError]] = {kind.__name__: kind for kind in (RunError, UsageError, WriteError)}


class RankFailure(NamedTuple):
    """What a rank says before it ends."""

    rank: int
    #: ranks that fail later have higher numbers: seconds of the machine's clock, or a count
    order: float
    #: the exception to raise, one of `KINDS`
    kind: str
    #: whether losing the connection to another rank can have this effect
    may_follow: bool
    text: str

    def to_exception(self) -> ReportedError:
        """Return the exception that the driver raises."""
        return KINDS[self.kind](*self.text.split("\n"))

    def to_json(self) -> dict[str, Any]:
        """Return the failure as JSON data: the arguments of this class."""
        return self._asdict()


def describe_failure(rank: int, order: float, error: BaseException) -> RankFailure:
    """Describe the exception that ends a rank. Only an unexpected one is described by its traceback."""
    if isinstance(error, (UsageError, RunError)):
        name = type(error).__name__
        return RankFailure(rank, order, name if name in KINDS else RunError.__name__, False, str(error)[:MAX_TEXT])
    last = "".join(traceback.format_exception_only(type(error), error))
    whole = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    text = f"{whole.removesuffix(last)}rank {rank}: {last}".rstrip()
    return RankFailure(rank, order, RunError.__name__, isinstance(error, (RuntimeError, OSError)), text[-MAX_TEXT:])
