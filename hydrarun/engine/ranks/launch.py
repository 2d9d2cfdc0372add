"""Runs a configuration in this process, on ranks started for it, or on ranks that torchrun started."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydrarun.config import batches
from hydrarun.core.distributed import limits
from hydrarun.core.distributed.degrees import (
    DIMENSIONS,
    KEYS,
    Degrees,
    count_worker_ranks,
    find_degree_problems,
    world_size,
)
from hydrarun.core.distributed.rank import is_rank, rank_info
from hydrarun.core.errors import RunError, UsageError
from hydrarun.engine.ranks import torchrun, worker
from hydrarun.engine.ranks.local_group import RanksExecutor
from hydrarun.engine.ranks.torchrun import TorchrunExecutor

if TYPE_CHECKING:
    from hydrarun.engine.runner import Runner
    from hydrarun.outputs.writer import Picture


class LocalExecutor:
    """Runs jobs in this process."""

    def __init__(self) -> None:
        self.session = worker.RankSession(None)

    def run_job(self, action: str, config: dict[str, Any], arguments: dict[str, Any]) -> Any:
        """Run a job in this process. The model stays loaded for the next one. Raises UsageError and RunError."""
        try:
            return self.session.run_job(action, config, arguments)
        except BaseException as error:
            if type(error) is not RunError:  # a RunError is raised between stages: the model is intact
                self.close()
            raise

    def close(self) -> None:
        """Free the model and its memory."""
        self.session.close()


class RemoteRunner:
    """A model on ranks that were started for it, with the methods of a `Runner`. Call it from the main thread."""

    def __init__(self, config: dict[str, Any]) -> None:
        """Start the ranks and load the model. Raises what `Runner` raises."""
        self.config = config
        self.ranks = RanksExecutor()
        self.ranks.run_job("build", config, {})

    def generate(self, **sampling: Any) -> list[Picture]:
        """Draw as `Runner.generate` does. After an error the next call starts new ranks."""
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
        """End the ranks and free their memory."""
        self.ranks.close()


def _format_paths(images: Any) -> Any:
    """Convert one path or several to strings."""
    return [str(image) for image in images] if isinstance(images, (list, tuple)) else str(images)


_kept: LocalExecutor | RanksExecutor | TorchrunExecutor | None = None


def run_configuration(config: dict[str, Any], output_dir: Path) -> dict[str, Any]:
    """Run `config` (checked) here or on ranks and write into `output_dir`. The model stays loaded for the next run.

    Returns the content of run.json. Raises UsageError and RunError. Call `close_executor` in the end.
    """
    check_rank_count(config)
    config = fit_plan(config)
    if batches.is_batch_run(config):
        from hydrarun.engine.runs.batch import run_batches

        return run_batches(config, output_dir, lambda job: find_executor(config).run_job("batches", config, job))
    return find_executor(config).run_job("run", config, {"output_dir": str(output_dir)})


def find_executor(config: dict[str, Any]) -> LocalExecutor | RanksExecutor | TorchrunExecutor:
    """Return the executor of `config`: the last run's, if it is of the right kind."""
    global _kept
    kind = LocalExecutor if world_size(config["parallel"]) == 1 else TorchrunExecutor if is_rank() else RanksExecutor
    if not isinstance(_kept, kind):
        if _kept:
            close_executor()  # its memory may be needed for this run
        _kept = kind()
    return _kept


def fit_plan(config: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration that fits if `plan=auto`, and print the choice; else return `config`."""
    if not config["plan"]["auto"]:
        return config
    from hydrarun.engine.plan import planner

    return planner.fit_configuration(config, lambda text: print(text, file=sys.stderr))


def close_executor() -> None:
    """End the ranks of `run_configuration`, and torchrun's ranks, even if nothing was run."""
    global _kept
    kept, _kept = _kept, None
    if kept is None and is_rank() and rank_info().size > 1:
        kept = TorchrunExecutor()
    if kept:
        kept.close()


def load_runner(config: dict[str, Any]) -> Runner | RemoteRunner:
    """Load a model: in this process, as this rank of torchrun's, or on ranks started for it."""
    if config["warmup"]:
        raise UsageError("warmup: only for the command; from Python, the first call of generate() is the warm-up")
    if batches.is_batch_run(config):
        raise UsageError("input.prompts, batch_size: only for the command; from Python, call generate(prompt=…)")
    check_rank_count(config)
    config = fit_plan(config)
    if world_size(config["parallel"]) > 1 and not is_rank():
        return RemoteRunner(config)
    from hydrarun.engine.runner import Runner

    if world_size(config["parallel"]) == 1:
        return Runner(config)
    from torch.distributed import is_initialized

    if is_initialized():
        raise UsageError("load: this process has a process group already; under torchrun, load one model only")
    return worker.RankSession(torchrun.open_store()).build(config, quiet=True)


def check_rank_count(config: dict[str, Any]) -> None:
    """Raise UsageError if the configuration asks for more ranks than may be started, before any is.

    Under torchrun, raise it if torchrun started another number of ranks.
    """
    degrees, device = config["parallel"], config["device"]
    if is_rank():
        check_torchrun_count(degrees)
        return
    wanted, limit = world_size(degrees), degrees["max_ranks"] or limits.max_ranks(device)
    if wanted == 1 or wanted <= limit:
        return
    if degrees["max_ranks"]:
        reason = f"above parallel.max_ranks={limit}"
    elif device != "cpu" and limits.count_nvidia_devices():
        reason = f"and this machine has {limit} CUDA device{'' if limit == 1 else 's'}"
    else:
        reason = f"and this machine starts {limit} at most (one per core, or {limits.MIN_CPU_RANKS})"
    raise UsageError(
        f"parallel: {format_layout(degrees)}, {reason}: use smaller degrees, or parallel.max_ranks={wanted} on the"
        " command line"
    )


def check_torchrun_count(degrees: Degrees) -> None:
    """Raise UsageError if torchrun started another number of ranks than the degrees ask for."""
    if degrees["max_ranks"]:
        raise UsageError("parallel.max_ranks: torchrun starts the ranks, so it has no effect: leave it out")
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
    """Format the degrees: `data 1 x cfg 2 x … = 2 ranks`."""
    text = (
        " x ".join(f"{name} {degrees[f'{name}_degree']}" for name in DIMENSIONS)
        + f" = {format_ranks(count_worker_ranks(degrees))}"
    )
    if world_size(degrees) == count_worker_ranks(degrees):
        return text
    text += f", with hsdp {degrees['hsdp_degree']} and vae {degrees['vae_degree']}"
    return f"{text}: {format_ranks(world_size(degrees))}"


def format_ranks(count: int) -> str:
    """Format a number of ranks: `1 rank`, `2 ranks`…"""
    return f"{count} rank{'' if count == 1 else 's'}"


def suggest_degree(degrees: Degrees, count: int) -> str:
    """Return `, or parallel.ulysses_degree=2`: a change of one degree that gives `count` ranks; "" if none does."""
    for key in sorted(KEYS, key=lambda key: (-degrees[key], key != "ulysses_degree")):
        for value in range(1, count + 1):
            changed = {**degrees, key: value}
            if world_size(changed) == count and not list(find_degree_problems(changed)):
                return f", or parallel.{key}={value}"
    return ""
