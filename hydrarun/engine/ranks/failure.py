"""The failure of a rank, as it travels to the driver."""

from __future__ import annotations

import traceback
from typing import Any, NamedTuple

from hydrarun.core.errors import RunError, UsageError

#: the longest text of a failure in characters; of a longer traceback the end is kept
MAX_TEXT = 8000


class RankFailure(NamedTuple):
    """What a rank says before it ends."""

    rank: int
    #: ranks that fail later have higher numbers: seconds of the machine's clock, or a count
    order: float
    #: whether the user must change something, which gives exit code 2
    usage: bool
    #: whether losing the connection to another rank can have this effect
    may_follow: bool
    text: str

    def to_exception(self) -> UsageError | RunError:
        """Return the exception that the driver raises."""
        return (UsageError if self.usage else RunError)(*self.text.split("\n"))

    def to_json(self) -> dict[str, Any]:
        """Return the failure as JSON data: the arguments of this class."""
        return self._asdict()


def describe_failure(rank: int, order: float, error: BaseException) -> RankFailure:
    """Describe the exception that ends a rank. Only an unexpected one is described by its traceback."""
    usage = isinstance(error, UsageError)
    if usage or isinstance(error, RunError):
        return RankFailure(rank, order, usage, False, str(error)[:MAX_TEXT])
    last = "".join(traceback.format_exception_only(type(error), error))
    whole = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    text = f"{whole.removesuffix(last)}rank {rank}: {last}".rstrip()
    return RankFailure(rank, order, False, isinstance(error, (RuntimeError, OSError)), text[-MAX_TEXT:])
