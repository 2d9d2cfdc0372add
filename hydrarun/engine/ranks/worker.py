"""The rank's side: builds once, then runs jobs in order until there are none. Does not use Hydra.

Jobs, results and failures are JSON. A rank that a driver on this machine started shares a pair of sockets with it
(`DriverLink`); a rank of torchrun has a link to rank 0 (`torchrun.TorchrunLink`).
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from hydrarun.config import targets
from hydrarun.core.distributed.rank import RankInfo, rank_info, threads_per_rank
from hydrarun.core.errors import UsageError
from hydrarun.core.interruption import get_interruption_code
from hydrarun.core.printable import printable_output
from hydrarun.engine.ranks.failure import RankFailure, describe_failure
from hydrarun.engine.ranks.messages import receive_message, send_message

if TYPE_CHECKING:
    from torch.distributed import Store

    from hydrarun.core.progress import Progress
    from hydrarun.engine.runner import Runner

#: timeout of a collective: another rank may be reading weights, or compiling
COLLECTIVE = timedelta(hours=1)

#: config sections that a runner is built from; jobs with equal ones share a runner
BUILT_FROM = (
    "model",
    "scheduler",
    "parallel",
    "attention",
    "offload",
    "compile",
    "quantization",
    "vae",
    "device",
    "dtype",
    "verify",
)

PR_SET_PDEATHSIG = 1


def build_key(config: dict[str, Any]) -> str:
    """Return a key that is equal for configurations that can share a runner."""
    return json.dumps([config[name] for name in BUILT_FROM], sort_keys=True)


def make_runner(config: dict[str, Any], progress: Progress, device: str | None) -> Runner:
    """Build the runner of this rank. `device`: this rank's own, where `config` names one for all ranks."""
    from hydrarun.engine.runner import Runner

    return Runner(config, progress, device)


class RankSession:
    """A process's runner and process group: built for the first job, kept while jobs have equal build settings."""

    def __init__(self, store: Store | None) -> None:
        """`store`: where the ranks find each other; None for a single process."""
        self.store = store
        self.place = rank_info()
        self.runner: Runner | None = None
        self.key = ""
        self.device = ""
        self.groups = 0
        if store:
            import torch

            torch.set_num_threads(threads_per_rank(self.place.local_size))

    def run_job(self, action: str, config: dict[str, Any], arguments: dict[str, Any]) -> Any:
        """Run a job. On rank 0, return its result as JSON data."""
        runner = self.build(config, quiet=action not in ("run", "batches"))
        if action == "run":
            from hydrarun.engine.runs.single import follow_single, run_single

            if self.place.rank > 0:
                return follow_single(runner, config)
            return run_single(runner, config, Path(arguments["output_dir"]))
        if action == "batches":
            from hydrarun.config.batches import BatchJob
            from hydrarun.engine.runs import batch_worker

            return batch_worker.draw_batches(runner, config, BatchJob.from_json(arguments, config))
        if action == "generate":
            drawn = runner.generate(**arguments["sampling"])
            return save_arrays(drawn, Path(arguments["folder"])) if self.place.rank == 0 else None
        return None

    def build(self, config: dict[str, Any], quiet: bool) -> Runner:
        """Return the current runner if it fits `config`, else a new one. Rank 0 shows its progress unless `quiet`.

        Raises UsageError and RunError.
        """
        from hydrarun.core.progress import Progress, SilentProgress
        from hydrarun.outputs.provenance import reset_peak_host_bytes

        reset_peak_host_bytes()
        if self.runner and build_key(config) == self.key:
            self.runner.reset_stats()
        else:
            self.close()
            progress = Progress(quiet=True) if self.place.rank > 0 else SilentProgress() if quiet else Progress()
            if self.store:
                self._join_group(config["device"], progress)
            self.runner = make_runner(config, progress, self.device or None)
            self.key = build_key(config)
        return self.runner

    def _join_group(self, device: str, progress: Progress) -> None:
        """Choose this rank's device and form a process group with the others."""
        self.device = choose_rank_device(device, self.place)
        if device == "auto":
            progress.note(f"device={self.device.partition(':')[0]} (auto)")
        self._join()

    def _join(self) -> None:
        """Form the process group with the other ranks."""
        import torch
        import torch.distributed as dist

        if self.device != "cpu":
            torch.cuda.set_device(self.device)
        self.groups += 1
        dist.init_process_group(
            "gloo" if self.device == "cpu" else "nccl",
            store=dist.PrefixStore(f"group/{self.groups}", self.store),
            rank=self.place.rank,
            world_size=self.place.size,
            timeout=COLLECTIVE,
        )

    def close(self) -> None:
        """Free the runner and the process group. Call it when every rank has finished its jobs."""
        if not self.runner:
            return
        import torch
        import torch.distributed as dist

        self.runner = None
        gc.collect()
        torch.cuda.empty_cache()  # does nothing without CUDA
        if self.store:
            dist.destroy_process_group()


def choose_rank_device(name: str, place: RankInfo) -> str:
    """Return this rank's device: `cpu`, or the CUDA device of its local rank. Raises UsageError."""
    import torch

    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return "cpu"
    if name not in ("auto", "cuda", "cuda:0"):  # rank 0 records cuda:0 in run.json
        raise UsageError(f"device={name}: each of {place.size} ranks has a device of its own; use device=cuda")
    count = torch.cuda.device_count()
    if count < place.local_size:
        raise UsageError(
            f"device={name}: {place.local_size} ranks on this machine need as many CUDA devices, and torch sees "
            f"{count}; use fewer ranks, or device=cpu"
        )
    return f"cuda:{place.local_rank}"


def save_arrays(drawn: Sequence[Any], folder: Path) -> list[dict[str, Any]]:
    """Save pictures as 0.npy, 1.npy… in `folder` and return their other fields."""
    import numpy as np

    for index, picture in enumerate(drawn):
        np.save(folder / f"{index}.npy", picture.pixels, allow_pickle=False)
    return [{key: value for key, value in vars(picture).items() if key != "pixels"} for picture in drawn]


class Link(Protocol):
    """A rank's connection to its driver."""

    def receive_job(self) -> dict[str, Any] | None:
        """Wait for the next job: the arguments of `RankSession.run_job`, or None after the last job."""

    def finish_job(self, result: Any) -> None:
        """Tell the driver that this rank has run the job. Only rank 0 has a result."""

    def report_failure(self, error: BaseException) -> RankFailure | None:
        """Tell the driver why this rank ends. Return the failure if this rank has to print it."""

    def leave(self) -> None:
        """Tell the driver that this rank ends without a failure."""


class DriverLink:
    """The link of a rank to the driver that started it. The process ends as soon as the driver's end is closed."""

    def __init__(self, end: socket.socket) -> None:
        self.end = end
        self.rank = rank_info().rank
        self.jobs: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        threading.Thread(target=self._receive_jobs, daemon=True).start()

    def _receive_jobs(self) -> None:
        """Queue the jobs. A thread does it, to notice the driver's end during a job too."""
        try:
            while True:
                self.jobs.put(receive_message(self.end))
        except (EOFError, OSError):
            os._exit(1)

    def receive_job(self) -> dict[str, Any] | None:
        """Wait for the next job; None after the last one."""
        return self.jobs.get()

    def finish_job(self, result: Any) -> None:
        """Send rank 0's result."""
        if self.rank == 0:
            send_message(self.end, {"result": result})

    def report_failure(self, error: BaseException) -> None:
        """Send the failure. The driver prints it."""
        failure = describe_failure(self.rank, time.monotonic(), error)
        send_message(self.end, {"failure": failure.to_json()})

    def leave(self) -> None:
        """Tell the driver that this rank has finished; it may be killed now."""
        sys.stderr.flush()
        self.end.shutdown(socket.SHUT_WR)


def abort_rank(link: Link, error: BaseException) -> NoReturn:
    """Report a failure and end this process."""
    shown = ""
    try:
        if failure := link.report_failure(error):
            shown = failure.text
    finally:
        end_process(error, shown)


def end_process(error: BaseException, shown: str) -> NoReturn:
    """End this process with the exit code of `error`; print `shown` if it is not empty.

    Skips destructors: those of gloo and NCCL abort, or wait for ranks that have ended.
    """
    with suppress(OSError):
        if shown:
            print(shown, file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
    if isinstance(error, KeyboardInterrupt):
        os._exit(get_interruption_code(error))
    os._exit(2 if isinstance(error, UsageError) else 1)


def serve_rank(link: Link, store: Store) -> None:
    """Run jobs until there are no more. The process ends at the first failure."""
    try:
        # ranks above 0 have nothing to clean up, and must not wait in a collective
        signal.signal(signal.SIGINT, signal.default_int_handler if rank_info().rank == 0 else signal.SIG_DFL)
        session = RankSession(store)
        while (job := link.receive_job()) is not None:
            link.finish_job(session.run_job(**job))
        session.close()
        link.leave()
    except BaseException as error:
        abort_rank(link, error)


def end_with_parent(parent: int) -> None:
    """End this process when its parent, the process with the id `parent`, ends; at once if that has ended already.

    Only on Linux; elsewhere `DriverLink` notices it.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the request: no signal will come
        os._exit(1)


def main(argv: Sequence[str]) -> None:
    """Run a rank that a driver on this machine started.

    `argv`: the driver's process id, the descriptor of this rank's end of the pair, the file in which the ranks find
    each other, then classes to allow.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until a job begins there is nothing to clean up
    parent, descriptor, rendezvous, *allowed = argv
    end_with_parent(int(parent))
    end = socket.socket(fileno=int(descriptor))
    end.set_inheritable(False)  # the driver waits until no process holds it
    link = DriverLink(end)
    for name in allowed:
        targets.allow_target(name)
    from torch.distributed import FileStore

    store = FileStore(rendezvous)
    store.set_timeout(COLLECTIVE)
    with printable_output():
        serve_rank(link, store)


if __name__ == "__main__":
    main(sys.argv[1:])
