"""A pool of processes for tests with several ranks: started once, shared by all of these tests.

    results = pool(2, function, argument)     # on ranks 0 and 1, in a gloo group of two

`function` must be a module-level function (it is pickled by name) with a picklable result.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

#: modules that take seconds to import; imported once, in the process that the ranks are forked from
PRELOAD = [
    "cache_dit",
    "diffusers.pipelines.flux.pipeline_flux",
    "diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus",
    "diffusers.pipelines.wan.pipeline_wan_i2v",
    "hydrarun.engine.runner",
]

#: calls after which the ranks form a new group. Layouts leave process groups, whose threads poll even when idle.
RENEW = 8


class Pool:
    """Processes that form a gloo group of the size that a call requests."""

    def __init__(self) -> None:
        self.context = mp.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOAD)
        self.pipes: list[Connection] = []
        self.processes: list[Any] = []
        self.folder = Path(tempfile.mkdtemp(prefix="ranks"))
        self.groups = self.calls = 0
        self.size = 0

    def __call__(self, size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Return the results of `function(*arguments)` on `size` ranks. Raises AssertionError with their tracebacks."""
        while len(self.pipes) < size:
            ours, theirs = self.context.Pipe()
            process = self.context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)
        if size != self.size or self.calls == RENEW:
            self.size, self.groups, self.calls = size, self.groups + 1, 0
            for rank, pipe in enumerate(self.pipes):
                pipe.send((_join, (rank, size, str(self.folder / str(self.groups)))))
            self._results(len(self.pipes))
        self.calls += 1
        for pipe in self.pipes[:size]:
            pipe.send((function, arguments))
        return self._results(size)

    def _results(self, size: int) -> list[Any]:
        results = []
        for rank, pipe in enumerate(self.pipes[:size]):
            if not pipe.poll(120):
                self.close()
                raise TimeoutError(f"rank {rank} does not answer: the ranks wait for each other")
            results.append(pipe.recv())
        failed = [(rank, error) for rank, (error, _) in enumerate(results) if error]
        if failed:
            self.close()  # the other ranks would wait forever
            raise AssertionError("\n".join(f"rank {rank}:\n{error}" for rank, error in failed))
        return [result for _, result in results]

    def close(self) -> None:
        """End the processes; the next call starts new ones."""
        for process in self.processes:
            process.kill()
            process.join()
        self.pipes, self.processes, self.size = [], [], 0


def _serve(pipe: Connection) -> None:
    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((None, function(*arguments)))
        except BaseException:
            pipe.send((traceback.format_exc(), None))


def _join(rank: int, size: int, file: str) -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
    if rank < size:
        dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=size)
