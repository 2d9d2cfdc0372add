"""The rank's side: builds once, then runs jobs in order until there are none. Does not use Hydra.

Driver and ranks share a key-value store: `job/0`, `job/1`… are jobs as JSON (`null`: no more jobs), `result/0`… are
rank 0's results, `failure` is the first failure of all ranks.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import json
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from hydrarun.config import targets
from hydrarun.core.distributed.rank import RankInfo, rank_info, threads_per_rank
from hydrarun.core.errors import RunError, UsageError
from hydrarun.core.printable import printable_output

if TYPE_CHECKING:
    from torch.distributed import Store

    from hydrarun.core.progress import Progress
    from hydrarun.engine.runner import Runner

#: timeout of a collective: another rank may be reading weights, or compiling
COLLECTIVE = timedelta(hours=1)

#: timeout of the wait for the next job
IDLE = timedelta(days=365)

#: timeout of connecting to the store of a driver on the same machine
CONNECT = timedelta(minutes=2)

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
        """`store`: the ranks' shared store; None for a single process."""
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
        from hydrarun.core.progress import Progress
        from hydrarun.outputs.provenance import reset_peak_host_bytes

        reset_peak_host_bytes()
        if self.runner and build_key(config) == self.key:
            self.runner.reset_stats()
        else:
            self.close()
            progress = Progress(quiet=quiet or self.place.rank > 0)
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


def publish_failure(store: Store, rank: int, error: BaseException) -> None:
    """Put the first failure of all ranks into the store. Later failures are its consequences."""
    if store.add("failures", 1) > 1:
        return
    if isinstance(error, (UsageError, RunError)):
        text = str(error)
    else:
        last = "".join(traceback.format_exception_only(type(error), error))
        whole = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        text = f"{whole.removesuffix(last)}rank {rank}: {last}".rstrip()
    store.set("failure", json.dumps({"rank": rank, "usage": isinstance(error, UsageError), "text": text}))


def read_failure(store: Store) -> tuple[int, UsageError | RunError]:
    """Return the rank that failed first, and its error."""
    said = json.loads(store.get("failure"))
    return said["rank"], (UsageError if said["usage"] else RunError)(*said["text"].split("\n"))


def abort(store: Store, rank: int, error: BaseException, tell: bool) -> NoReturn:
    """End this process after a failure. If `tell` is set and this rank failed first, print the error.

    Skips destructors: those of gloo and NCCL abort, or wait for ranks that have ended.
    """
    code = 1
    try:
        publish_failure(store, rank, error)
        first, said = read_failure(store)
        code = 2 if isinstance(said, UsageError) else 1
        if isinstance(error, KeyboardInterrupt):
            code, said = 130, RunError("interrupted")
        if tell and first == rank:
            print(said, file=sys.stderr)
    finally:
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def serve_rank(store: Store, tell: bool) -> None:
    """Run jobs until there are no more. The process ends at the first failure."""
    rank = rank_info().rank
    if rank > 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # nothing to clean up, and no waiting in a collective
    try:
        session = RankSession(store)
        for number in itertools.count():
            job = json.loads(store.get(f"job/{number}"))
            if job is None:
                break
            result = session.run_job(**job)
            if rank == 0:
                store.set(f"result/{number}", json.dumps(result))
        session.close()
        store.set(f"left/{rank}", "")
    except BaseException as error:
        abort(store, rank, error, tell)


def open_torchrun_store() -> Store:
    """Open the store that torchrun's ranks share."""
    from torch.distributed import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(rendezvous("env://", timeout=IDLE))
    return PrefixStore("hydrarun", store)


def main(argv: Sequence[str]) -> None:
    """Run a rank that a driver on this machine started. `argv`: the port of its store, then classes to allow."""
    if sys.platform == "linux":  # the rank is killed when its driver is
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    from torch.distributed import PrefixStore, TCPStore

    port, *allowed = argv
    for name in allowed:
        targets.allow_target(name)
    store = TCPStore("127.0.0.1", int(port), is_master=False, timeout=CONNECT)
    store.set_timeout(IDLE)
    with printable_output():
        serve_rank(PrefixStore("hydrarun", store), tell=False)


if __name__ == "__main__":
    main(sys.argv[1:])
