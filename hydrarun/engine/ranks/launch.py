"""Where a configuration is run: in this process, on ranks started for it, or on those that torchrun started."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import threading
from contextlib import AbstractContextManager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydrarun.config import batches
from hydrarun.core.distributed.degrees import DIMENSIONS, Degrees, count_worker_ranks, find_degree_problems, world_size
from hydrarun.core.distributed.rank import is_rank, rank_info
from hydrarun.core.errors import RunError, UsageError
from hydrarun.engine.ranks import worker
from hydrarun.engine.ranks.local_group import FAREWELL, GRACE, RanksExecutor
from hydrarun.outputs.failure_record import record_failure

if TYPE_CHECKING:
    from hydrarun.engine.runner import Runner
    from hydrarun.outputs.writer import Picture


class LocalExecutor:
    """This process alone."""

    def __init__(self) -> None:
        self.session = worker.RankSession(None)

    def run_job(self, action: str, config: dict[str, Any], arguments: dict[str, Any]) -> Any:
        """A job for this process. What is loaded stays for the next one. Raises UsageError and RunError."""
        try:
            return self.session.run_job(action, config, arguments)
        except BaseException as error:
            if type(error) is not RunError:  # such a one is raised between stages: what is loaded is as it was
                self.close()
            raise

    def close(self) -> None:
        """Let the model go, and its memory."""
        self.session.close()


class TorchrunExecutor:
    """Rank 0 of ranks that torchrun started: driver and rank at once. A failure ends this process too."""

    def __init__(self) -> None:
        self.store = worker.open_torchrun_store()
        self.session: worker.RankSession | None = None
        self.jobs = 0
        signal.signal(signal.SIGTERM, delay_exit)

    def run_job(self, action: str, config: dict[str, Any], arguments: dict[str, Any]) -> Any:
        """A job for all ranks; returns this rank's result. Of a run that fails there is a record before the end."""
        job = json.dumps({"action": action, "config": config, "arguments": arguments})
        self.store.set(f"job/{self.jobs}", job)
        self.jobs += 1
        try:
            with record_job_failure(action, config, arguments):
                return self._own(**json.loads(job))
        except BaseException as error:
            worker.abort(self.store, 0, error, tell=True)

    def _own(self, **job: Any) -> Any:
        """This rank's part. Raises what failed first, on whichever rank."""
        try:
            self.session = self.session or worker.RankSession(self.store)
            return self.session.run_job(**job)
        except Exception as error:
            worker.publish_failure(self.store, 0, error)
            raise worker.read_failure(self.store)[1] from error

    def close(self) -> None:
        """Let the other ranks go."""
        from torch.distributed import DistError

        self.store.set(f"job/{self.jobs}", "null")
        if self.session:
            self.session.close()
        with suppress(DistError):  # this process may be the store's host: the others must have read it
            self.store.wait([f"left/{rank}" for rank in range(1, rank_info().size)], timedelta(seconds=FAREWELL))


def record_job_failure(action: str, config: dict[str, Any], arguments: dict[str, Any]) -> AbstractContextManager[None]:
    """What keeps a record of a job that fails, where a failure is the end of this process."""
    if action == "run":
        return record_failure(config, Path(arguments["output_dir"]))
    if action == "batches":
        from hydrarun.core.progress import Progress
        from hydrarun.engine.runs.batch import BatchPlan, recording_failures
        from hydrarun.outputs.writer import current_timestamp

        folder = Path(arguments["output_dir"])
        return recording_failures(lambda: BatchPlan(config, folder, Progress()), current_timestamp())
    return nullcontext()


def delay_exit(*_: Any) -> None:
    """When torchrun ends what is left after a failure, rank 0 gets some time to write down what it was."""
    end = threading.Timer(GRACE, os._exit, [128 + signal.SIGTERM])
    end.daemon = True
    end.start()


class RemoteRunner:
    """A model on ranks that were started for it, with the methods of a `Runner`. Call it from the main thread."""

    def __init__(self, config: dict[str, Any]) -> None:
        """Raises what `Runner` raises."""
        self.config = config
        self.ranks = RanksExecutor()
        self.ranks.run_job("build", config, {})

    def generate(self, **sampling: Any) -> list[Picture]:
        """As `Runner.generate`. After an error the next call starts new ranks."""
        import numpy as np

        from hydrarun.outputs.writer import Picture

        if "images" in sampling:
            sampling["images"] = _format_paths(sampling["images"])
        with tempfile.TemporaryDirectory(prefix="hydrarun-") as folder:
            items = self.ranks.run_job("generate", self.config, {"folder": folder, "sampling": sampling})
            files = [Path(folder, f"{index}.npy") for index in range(len(items))]
            pixels = [np.load(file, allow_pickle=False) for file in files]
        return [Picture(pixels=drawn, **item) for drawn, item in zip(pixels, items, strict=True)]

    def close(self) -> None:
        """Let the ranks go, and their memory."""
        self.ranks.close()


def _format_paths(images: Any) -> Any:
    """Paths as text, one or many."""
    return [str(image) for image in images] if isinstance(images, (list, tuple)) else str(images)


_kept: LocalExecutor | RanksExecutor | TorchrunExecutor | None = None


def run_configuration(config: dict[str, Any], output_dir: Path) -> dict[str, Any]:
    """Draw what `config` (checked) asks for into `output_dir`, here or on ranks; what is loaded stays for the next run.

    Returns run.json. Raises UsageError and RunError. Whoever calls this calls `close` in the end.
    """
    config = fit_plan(config)
    check_rank_count(config["parallel"])
    if batches.is_batch_run(config):
        from hydrarun.engine.runs.batch import run_batches

        return run_batches(config, output_dir, lambda job: find_executor(config).run_job("batches", config, job))
    return find_executor(config).run_job("run", config, {"output_dir": str(output_dir)})


def find_executor(config: dict[str, Any]) -> LocalExecutor | RanksExecutor | TorchrunExecutor:
    """What runs `config`: what ran the last one, if that will do."""
    global _kept
    kind = LocalExecutor if world_size(config["parallel"]) == 1 else TorchrunExecutor if is_rank() else RanksExecutor
    if not isinstance(_kept, kind):
        if _kept:
            close_executor()  # its memory may be needed here
        _kept = kind()
    return _kept


def fit_plan(config: dict[str, Any]) -> dict[str, Any]:
    """With `plan=auto` the configuration that fits, which is said; else the same."""
    if not config["plan"]["auto"]:
        return config
    from hydrarun.engine.plan import planner

    return planner.fit_configuration(config, lambda text: print(text, file=sys.stderr))


def close_executor() -> None:
    """Let the ranks of `run` go, and those that torchrun started, whether there was a run or not."""
    global _kept
    kept, _kept = _kept, None
    if record_job_failure is None and is_rank() and rank_info().size > 1:
        kept = TorchrunExecutor()
    if kept:
        kept.close()


def load_runner(config: dict[str, Any]) -> Runner | RemoteRunner:
    """A loaded model: in this process, as this rank of torchrun's, or on ranks started for it."""
    if config["warmup"]:
        raise UsageError("warmup: for what the command times; from Python the first call of generate() is one")
    if batches.is_batch_run(config):
        raise UsageError("input.prompts, batch_size: for the command; from Python call generate(prompt=…) for each")
    config = fit_plan(config)
    check_rank_count(config["parallel"])
    if world_size(config["parallel"]) > 1 and not is_rank():
        return RemoteRunner(config)
    from hydrarun.engine.runner import Runner

    if world_size(config["parallel"]) == 1:
        return Runner(config)
    from torch.distributed import is_initialized

    if is_initialized():
        raise UsageError("load: this process has a process group already; under torchrun load one model with ranks")
    return worker.RankSession(worker.open_torchrun_store()).build(config, quiet=True)


def check_rank_count(degrees: Degrees) -> None:
    """Raises UsageError if torchrun started another number of ranks than the degrees ask for."""
    if not is_rank():
        return
    here, wanted = rank_info(), world_size(degrees)
    if here.size == wanted:
        return
    nodes = max(1, here.size // here.local_size)
    use = f"--nproc_per_node {wanted // nodes}" if wanted % nodes == 0 else f"{format_ranks(wanted)} in all"
    raise UsageError(
        f"parallel: {format_layout(degrees)}, and torchrun started {here.size}:"
        f" use {use}{suggest_degree(degrees, here.size)}"
    )


def format_layout(degrees: Degrees) -> str:
    """`data 1 x cfg 2 x … = 2 ranks`."""
    text = (
        " x ".join(f"{name} {degrees[f'{name}_degree']}" for name in DIMENSIONS)
        + f" = {format_ranks(count_worker_ranks(degrees))}"
    )
    if world_size(degrees) == count_worker_ranks(degrees):
        return text
    text += f", with hsdp {degrees['hsdp_degree']} and vae {degrees['vae_degree']}"
    return f"{text}: {format_ranks(world_size(degrees))}"


def format_ranks(count: int) -> str:
    """`1 rank`, `2 ranks`…"""
    return f"{count} rank{'' if count == 1 else 's'}"


def suggest_degree(degrees: Degrees, count: int) -> str:
    """`, or parallel.ulysses_degree=2`: one degree that would make it that many ranks; "" if there is none."""
    for key in sorted(degrees, key=lambda key: (-degrees[key], key != "ulysses_degree")):
        for value in range(1, count + 1):
            changed = {**degrees, key: value}
            if world_size(changed) == count and not list(find_degree_problems(changed)):
                return f", or parallel.{key}={value}"
    return ""
