"""Ranks that torchrun started: rank 0 is the driver and sends the others its jobs.

Jobs and failures travel as JSON through a gloo group of their own. torchrun's store only tells the ranks each other's
addresses, and counts failures.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from contextlib import AbstractContextManager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from hydrarun.core.distributed.rank import rank_info
from hydrarun.core.errors import RunError
from hydrarun.core.interruption import Interrupted
from hydrarun.engine.ranks import worker
from hydrarun.engine.ranks.failure import RankFailure, describe_failure
from hydrarun.engine.ranks.local_group import FAREWELL, GRACE, POLL
from hydrarun.outputs.failure_record import record_failure

if TYPE_CHECKING:
    import torch
    from torch.distributed import Store

#: timeout of the wait for the next job
IDLE = timedelta(days=365)

#: bytes of a rank's last message, which rank 0 receives into memory set aside: more than a failure's text as JSON
LAST_MESSAGE = 2**17


def open_store() -> Store:
    """Open the store that torchrun's ranks share."""
    from torch.distributed import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(rendezvous("env://", timeout=IDLE))
    return PrefixStore("hydrarun", store)


class TorchrunLink:
    """A rank's link to rank 0. Every rank above 0 sends one message, its last: a failure, or None when it leaves."""

    def __init__(self, store: Store) -> None:
        """Connect all ranks. Waits for the others."""
        import torch
        from torch.distributed import PrefixStore, ProcessGroupGloo

        self.place = rank_info()
        self.store = store
        self.group = ProcessGroupGloo(PrefixStore("jobs", store), self.place.rank, self.place.size, IDLE)
        others = range(1, self.place.size) if self.place.rank == 0 else ()
        #: by rank: memory for its last message, and the receive operation, which started before any failure
        self.incoming = {}
        for rank in others:
            buffer = torch.empty(LAST_MESSAGE, dtype=torch.uint8)
            self.incoming[rank] = buffer, self.group.recv([buffer], rank, 0)

    def send_job(self, job: dict[str, Any] | None) -> None:
        """Send a job to all ranks, from rank 0; None: there are no more."""
        import torch

        body = _to_tensor(json.dumps(job).encode())
        self._broadcast(torch.tensor([body.numel()]))
        self._broadcast(body)

    def receive_job(self) -> dict[str, Any] | None:
        """Wait for the next job; None after the last one."""
        import torch

        size = torch.empty(1, dtype=torch.int64)
        self._broadcast(size)
        body = torch.empty(int(size), dtype=torch.uint8)
        self._broadcast(body)
        return json.loads(body.numpy().tobytes())  # type: ignore[no-any-return]

    def _broadcast(self, tensor: torch.Tensor) -> None:
        self.group.broadcast(tensor, 0).wait()

    def finish_job(self, result: Any) -> None:
        """Do nothing: rank 0, the driver, has the result already."""

    def describe(self, error: BaseException) -> RankFailure:
        """Describe this rank's failure, in the order of all ranks' failures."""
        return describe_failure(self.place.rank, self.store.add("failures", 1), error)

    def report_failure(self, error: BaseException) -> RankFailure | None:
        """Send the failure to rank 0, which records it. Return it if it is the first of all ranks."""
        failure = self.describe(error)
        if self.place.rank > 0:
            self._send_last(failure.to_json())
        return failure if failure.order == 1 else None

    def leave(self) -> None:
        """Tell rank 0 that this rank ends without a failure."""
        self._send_last(None)

    def _send_last(self, content: Any) -> None:
        body = json.dumps(content).encode().ljust(LAST_MESSAGE)
        with suppress(RuntimeError):  # rank 0 may have ended
            self.group.send([_to_tensor(body)], 0, 0).wait(timedelta(seconds=GRACE))

    def find_first_failure(self, error: BaseException) -> RankFailure:
        """Return the failure that ends all ranks, on rank 0, which fails with `error`.

        That is the earliest, unless ranks have ended without a message: then the others may only have lost them.
        """
        own = self.describe(error)
        if own.order == 1 and not own.may_follow:
            return own
        failures, lost = self.receive_last_messages(GRACE)
        failures.append(own)
        if lost and all(failure.may_follow for failure in failures):
            text = f"rank {lost[0]} ended without a message: torchrun reports its exit code"
            return RankFailure(lost[0], 0, RunError.__name__, may_follow=False, text=text)
        return min(failures, key=lambda failure: failure.order)

    def receive_last_messages(self, seconds: float) -> tuple[list[RankFailure], list[int]]:
        """Wait up to `seconds` for the last messages; return the failures, and the ranks that have ended without."""
        deadline = time.monotonic() + seconds
        failures, lost = [], []
        for rank, (buffer, work) in self.incoming.items():
            try:
                work.wait(timedelta(seconds=max(0.001, deadline - time.monotonic())))
            except RuntimeError:  # the connection is closed, or the rank still works
                if time.monotonic() < deadline:
                    lost.append(rank)
            else:
                content = json.loads(buffer.numpy().tobytes())
                failures += [RankFailure(**content)] if content else []
        return failures, lost


def _to_tensor(body: bytes) -> torch.Tensor:
    import torch

    return torch.frombuffer(bytearray(body), dtype=torch.uint8)


class TorchrunExecutor:
    """Rank 0 of torchrun's ranks: both driver and rank. A failure ends this process too."""

    def __init__(self) -> None:
        self.store = open_store()
        self.link = TorchrunLink(self.store)
        self.session: worker.RankSession | None = None
        #: whether torchrun has sent SIGTERM: a rank has failed, or somebody ends torchrun itself
        self.terminated = False
        signal.signal(signal.SIGTERM, self._interrupt_later)

    def run_job(self, action: str, config: dict[str, Any], arguments: dict[str, Any]) -> Any:
        """Run a job on all ranks and return this rank's result. Records a failed run before the process ends."""
        job = {"action": action, "config": config, "arguments": arguments}
        shown = "interrupted"
        try:
            with record_job_failure(action, config, arguments):
                try:
                    return self._run_part(job)
                except (Exception, Interrupted) as error:
                    first = self._find_cause(error)
                    shown = "" if first.rank > 0 and first.order == 1 else first.text  # that rank has printed it
                    raise first.to_exception() from error
        except BaseException as error:
            worker.end_process(error, shown)

    def _find_cause(self, error: BaseException) -> RankFailure:
        """Return the failure that ends all ranks. Raises Interrupted if there is none: a signal has ended them."""
        interrupted = isinstance(error, Interrupted)
        if not (interrupted or self.terminated):
            return self.link.find_first_failure(error)
        failures, _ = self.link.receive_last_messages(POLL if interrupted else GRACE)
        own = None if interrupted else self.link.describe(error)
        if own and not own.may_follow:
            failures.append(own)
        if not failures:
            raise error if interrupted else Interrupted(signal.SIGTERM)
        return min(failures, key=lambda failure: failure.order)

    def _interrupt_later(self, *_: Any) -> None:
        """Handle SIGTERM: leave `GRACE` seconds to hear of the failure for which torchrun ends the ranks, if any."""
        self.terminated = True
        signal.signal(signal.SIGALRM, interrupt_now)
        signal.setitimer(signal.ITIMER_REAL, GRACE)
        end = threading.Timer(3 * GRACE, os._exit, [128 + signal.SIGTERM])
        end.daemon = True
        end.start()

    def _run_part(self, job: dict[str, Any]) -> Any:
        """Send the job to the other ranks and run this rank's part."""
        self.link.send_job(job)
        self.session = self.session or worker.RankSession(self.store)
        return self.session.run_job(**json.loads(json.dumps(job)))

    def close(self) -> None:
        """End the other ranks, and wait for them: this process may host the store that they use."""
        with suppress(RuntimeError):  # a rank has ended already
            self.link.send_job(None)
        if self.session:
            self.session.close()
        self.link.receive_last_messages(FAREWELL)


def record_job_failure(action: str, config: dict[str, Any], arguments: dict[str, Any]) -> AbstractContextManager[None]:
    """Return a context manager that records a failed job, for a process that ends at a failure."""
    if action == "run":
        return record_failure(config, Path(arguments["output_dir"]))
    if action == "batches":
        from hydrarun.core.progress import Progress
        from hydrarun.engine.runs.batch import BatchPlan, recording_failures
        from hydrarun.outputs.writer import current_timestamp

        folder = Path(arguments["output_dir"])
        return recording_failures(lambda: BatchPlan(config, folder, Progress()), current_timestamp())
    return nullcontext()


def interrupt_now(*_: Any) -> NoReturn:
    """Interrupt this process as SIGTERM does elsewhere."""
    raise Interrupted(signal.SIGTERM)
