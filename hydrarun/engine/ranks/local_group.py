"""The driver's side of several ranks: starts them, sends them jobs, reports which one failed and why.

Jobs, results and failures travel through pairs of sockets that the ranks inherit, and the ranks find each other by a
file in a folder that only its owner may enter. torch's launcher and its TCPStore could do both, but every user of this
machine can connect to their ports.
"""

from __future__ import annotations

import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from hydrarun.config import targets
from hydrarun.core.distributed.degrees import world_size
from hydrarun.core.distributed.rank import threads_per_rank
from hydrarun.core.errors import RunError
from hydrarun.engine.ranks import worker
from hydrarun.engine.ranks.failure import RankFailure
from hydrarun.engine.ranks.messages import MessageBuffer, encode_message

#: the module that a rank runs
WORKER = "hydrarun.engine.ranks.worker"

#: seconds for ranks to end by themselves: after a failure (rank 0 writes run.json), and after their last job
GRACE = 3.0
FAREWELL = 10.0

POLL = 0.02

LOG_LINES = 20


class RankGroup:
    """Ranks on this machine. They die with the thread that started them, so start them from the main thread."""

    def __init__(self, size: int) -> None:
        """Start the ranks. Raises RunError if the system does not start them all."""
        self.size = size
        self.logs: list[IO[bytes]] = []
        self.folder = tempfile.TemporaryDirectory(prefix="hydrarun-ranks-")  # mode 0700
        self.processes: list[subprocess.Popen[bytes]] = []
        self.buffers: list[MessageBuffer] = []
        #: exit codes and failures by rank, in the order in which they were noticed; results of rank 0
        self.ended: dict[int, int] = {}
        self.failures: dict[int, RankFailure] = {}
        self.results: list[Any] = []
        try:
            for rank in range(size):
                self._start(rank)
        except OSError as error:
            self.kill()
            raise RunError(f"parallel: rank {len(self.processes)} cannot be started: {error.strerror}") from error
        except BaseException:
            self.kill()
            raise

    def _start(self, rank: int) -> None:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self.size, "LOCAL_WORLD_SIZE": self.size}
        settings = {
            **place,
            "OMP_NUM_THREADS": threads_per_rank(self.size),
            "PYTHONPATH": os.pathsep.join(_list_module_paths()),
        }
        quiet = {"TORCH_CPP_LOG_LEVEL": "ERROR"}
        loopback = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
        self.logs.append(tempfile.TemporaryFile())  # noqa: SIM115 - unnamed, so nothing is left behind
        ours, theirs = socket.socketpair()
        self.buffers.append(MessageBuffer(ours))
        rendezvous = Path(self.folder.name, "rendezvous")
        words = map(str, (os.getpid(), theirs.fileno(), rendezvous, *targets.list_user_allowed()))
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", WORKER, *words],
                env={**quiet, **loopback, **os.environ, **{name: str(value) for name, value in settings.items()}},
                stdin=subprocess.DEVNULL,
                stdout=self.logs[rank],
                stderr=None if rank == 0 else subprocess.STDOUT,  # rank 0 shows the progress
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is the driver's to handle
            )
        self.processes.append(process)

    def run_job(self, action: str, config: dict[str, Any], arguments: dict[str, Any]) -> Any:
        """Run a job on all ranks and return rank 0's result. After any exception the group cannot be used.

        Raises a rank's own UsageError or RunError; RunError for a rank that failed otherwise, or died.
        """
        self._send({"action": action, "config": config, "arguments": arguments})
        try:
            while not self.results:
                if self.failures or self.ended:
                    self._wait(lambda: len(self.ended) == self.size, GRACE)
                    raise self._find_cause()
                self._exchange(POLL)
        except KeyboardInterrupt:
            self._interrupt()
            raise
        return self.results.pop()

    def _send(self, content: Any) -> None:
        message = encode_message(content)
        for buffer in self.buffers:
            buffer.put(message)

    def _exchange(self, seconds: float) -> None:
        """Wait up to `seconds` for ranks; send and receive what is possible; notice ranks that have ended."""
        with selectors.DefaultSelector() as selector:
            for buffer in self.buffers:
                if not buffer.closed:
                    wanted = selectors.EVENT_WRITE if buffer.unsent else 0
                    selector.register(buffer.end, selectors.EVENT_READ | wanted)
            selector.select(seconds)
        ended = {rank: process.poll() for rank, process in enumerate(self.processes)}
        for rank, buffer in enumerate(self.buffers):  # after `poll`: whoever has ended has said all that it will say
            buffer.send()
            for content in buffer.receive():
                self._take(rank, content)
        self.ended |= {rank: code for rank, code in ended.items() if code is not None and rank not in self.ended}

    def _take(self, rank: int, content: dict[str, Any]) -> None:
        """Keep a message of a rank: its failure, or the result of rank 0."""
        if "failure" in content:
            self.failures[rank] = RankFailure(**content["failure"])
        else:
            self.results.append(content["result"])

    def _wait(self, done: Callable[[], bool], seconds: float) -> None:
        """Wait up to `seconds` until `done()`."""
        deadline = time.monotonic() + seconds
        while not done() and time.monotonic() < deadline:
            self._exchange(POLL)

    def _find_cause(self) -> Exception:
        """Return the failure that ended the others.

        A rank that ended without a message is the cause: the others report that they lost it. But NCCL aborts a rank
        whose partner has ended; then the cause is a failure that losing a connection cannot have.
        """
        failures = sorted(self.failures.values(), key=lambda failure: failure.order)
        silent = [(rank, code) for rank, code in self.ended.items() if rank not in self.failures]
        if not silent:
            return failures[0].to_exception()
        rank, code = min(silent, key=lambda end: end[1] == -signal.SIGABRT)
        own = [failure for failure in failures if not failure.may_follow]
        if own and code == -signal.SIGABRT:
            return own[0].to_exception()
        end = f"was killed (signal {-code})" if code < 0 else f"ended with exit code {code}"
        return RunError(f"rank {rank} {end}", *self._last_lines(rank))

    def _last_lines(self, rank: int) -> list[str]:
        """Return the last lines that a rank printed before it ended."""
        self.logs[rank].seek(0)
        lines = self.logs[rank].read().decode(errors="replace").splitlines()[-LOG_LINES:]
        return [f"  {line}" for line in lines]

    def _interrupt(self) -> None:
        """Handle Ctrl-C: let rank 0 record the interruption in run.json, then end all ranks."""
        with suppress(ProcessLookupError):
            self.processes[0].send_signal(signal.SIGINT)
        try:
            self._wait(lambda: 0 in self.ended, GRACE)
        finally:
            self.kill()

    def kill(self) -> None:
        """End the ranks at once, with their child processes."""
        for process in self.processes:
            with suppress(ProcessLookupError):
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for buffer in self.buffers:
            buffer.end.close()
        self.folder.cleanup()

    def close(self) -> None:
        """End the ranks after their last job, without waiting until Python has freed all objects."""
        try:
            self._send(None)
            self._wait(lambda: all(buffer.closed for buffer in self.buffers), FAREWELL)
        finally:
            self.kill()


def _list_module_paths() -> list[str]:
    """Return this process's module search path, for another process."""
    return [entry or os.getcwd() for entry in sys.path]


class RanksExecutor:
    """Keeps a group from job to job. Starts another one if the build differs, or after a failure."""

    def __init__(self) -> None:
        self.group: RankGroup | None = None
        self.key = ""

    def run_job(self, action: str, config: dict[str, Any], arguments: dict[str, Any]) -> Any:
        """Run a job on all ranks that `config` asks for and return rank 0's result. Raises as `RankGroup.run_job`."""
        key = worker.build_key(config)
        if key != self.key:
            self.close()
        if self.group is None:
            self.group, self.key = RankGroup(world_size(config["parallel"])), key
        try:
            return self.group.run_job(action, config, arguments)
        except BaseException:
            group, self.group = self.group, None
            group.kill()
            raise

    def close(self) -> None:
        """End the ranks."""
        group, self.group = self.group, None
        if group:
            group.close()
