"""The driver's side of several ranks: starts them, sends them jobs, reports which one failed and why.

Jobs and results are sent as JSON through a store that listens only on the loopback interface. torch's `elastic_launch`
could start the ranks too, but its rendezvous listens on every interface.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from hydrarun.config import targets
from hydrarun.core.distributed.degrees import world_size
from hydrarun.core.distributed.rank import threads_per_rank
from hydrarun.core.errors import RunError
from hydrarun.engine.ranks import worker

if TYPE_CHECKING:
    from torch.distributed import Store

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
        self.size = size
        self.jobs = 0
        # output of each rank; unnamed files, so nothing is left behind
        self.logs = [tempfile.TemporaryFile() for _ in range(size)]  # noqa: SIM115
        listener = socket.create_server(("127.0.0.1", 0), backlog=size)
        port = listener.getsockname()[1]
        self.processes = [self._start(rank, port) for rank in range(size)]
        try:
            self.store = _make_store(listener, port)  # the ranks import torch meanwhile
        except BaseException:
            self.kill()
            raise

    def _start(self, rank: int, port: int) -> subprocess.Popen[bytes]:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self.size, "LOCAL_WORLD_SIZE": self.size}
        settings = {
            **place,
            "OMP_NUM_THREADS": threads_per_rank(self.size),
            "PYTHONPATH": os.pathsep.join(_list_module_paths()),
        }
        quiet = {"TORCH_CPP_LOG_LEVEL": "ERROR"}
        loopback = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
        return subprocess.Popen(
            [sys.executable, "-m", WORKER, str(port), *targets.list_user_allowed()],
            env={**quiet, **loopback, **os.environ, **{name: str(value) for name, value in settings.items()}},
            stdin=subprocess.DEVNULL,
            stdout=self.logs[rank],
            stderr=None if rank == 0 else subprocess.STDOUT,  # rank 0 shows the progress
            start_new_session=True,  # Ctrl-C is the driver's to handle
        )

    def run_job(self, action: str, config: dict[str, Any], arguments: dict[str, Any]) -> Any:
        """Run a job on all ranks and return rank 0's result. After any exception the group cannot be used.

        Raises a rank's own UsageError or RunError; RunError for a rank that failed otherwise, or died.
        """
        number = self.jobs
        self.jobs += 1
        try:
            self.store.set(f"job/{number}", json.dumps({"action": action, "config": config, "arguments": arguments}))
            while not self.store.check([f"result/{number}"]):
                if self.store.check(["failure"]) or self._ended():
                    raise self._failure()
                time.sleep(POLL)
        except KeyboardInterrupt:
            self._interrupt()
            raise
        return json.loads(self.store.get(f"result/{number}"))

    def _ended(self) -> dict[int, int]:
        """Return the exit codes of the ranks that have ended."""
        codes = {rank: process.poll() for rank, process in enumerate(self.processes)}
        return {rank: code for rank, code in codes.items() if code is not None}

    def _wait(self, ranks: int, seconds: float) -> None:
        """Wait up to `seconds` for the first `ranks` ranks to end."""
        deadline = time.monotonic() + seconds
        while any(process.poll() is None for process in self.processes[:ranks]) and time.monotonic() < deadline:
            time.sleep(POLL)

    def _failure(self) -> Exception:
        """Return the first failure. A killed rank reports none, and the others then report a lost connection."""
        self._wait(self.size, GRACE)
        ended = self._ended()
        said = worker.read_failure(self.store)[1] if self.store.check(["failure"]) else None
        for rank, code in ended.items():
            # NCCL and gloo may abort when another rank has ended
            if code < 0 and (said is None or code != -signal.SIGABRT):
                return RunError(f"rank {rank} was killed (signal {-code})", *self._last_lines(rank))
        if said:
            return said
        rank, code = next(iter(ended.items()))
        return RunError(f"rank {rank} ended with exit code {code}", *self._last_lines(rank))

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
            self._wait(1, GRACE)
        finally:
            self.kill()

    def kill(self) -> None:
        """End the ranks at once, with their child processes."""
        for process in self.processes:
            with suppress(ProcessLookupError):
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def close(self) -> None:
        """End the ranks after their last job."""
        try:
            self.store.set(f"job/{self.jobs}", "null")
            self._wait(self.size, FAREWELL)
        finally:
            self.kill()


def _make_store(listener: socket.socket, port: int) -> Store:
    from torch.distributed import PrefixStore, TCPStore

    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
    return PrefixStore("hydrarun", store)


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
