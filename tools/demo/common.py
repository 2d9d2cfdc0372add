"""Code shared by the two training loops: worker processes, gradient averaging and the Muon update."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

MUON_MOMENTUM = 0.95


def log(text: str) -> None:
    """Print a line with the time of day, unbuffered, so that a log file can be followed."""
    print(time.strftime("%H:%M:%S"), text, flush=True)


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def default_workers() -> int:
    """Return 1 for a GPU; on a CPU one single-threaded process per core, at most four.

    For small models thread synchronization costs more than threads gain, so processes are faster.
    """
    return 1 if torch.cuda.is_available() else max(1, min(4, os.cpu_count() or 1))


def launch(function: Callable[..., None], workers: int, *args: Any) -> None:
    """Run `function(rank, workers, *args)` in `workers` processes of a gloo group, or here for one worker."""
    if workers == 1:
        function(0, 1, *args)
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_worker, args=(workers, port, function, args), nprocs=workers)


def _worker(rank: int, workers: int, port: int, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=workers)
    function(rank, workers, *args)
    dist.barrier()
    dist.destroy_process_group()


def average_gradients(parameters: Sequence[torch.nn.Parameter], workers: int) -> None:
    """Replace each gradient by its mean over the workers, with one all-reduce."""
    if workers == 1:
        return
    owners = [p for p in parameters if p.grad is not None]
    flat = torch.cat([p.grad.flatten() for p in owners if p.grad is not None])
    dist.all_reduce(flat)
    flat /= workers
    offset = 0
    for p in owners:
        p.grad = flat[offset : offset + p.numel()].view_as(p)
        offset += p.numel()


def agree(value: float, workers: int) -> float:
    """Return the first worker's value, so that all workers use the same clock and stop at the same step."""
    if workers == 1:
        return value
    shared = torch.tensor(value, dtype=torch.float64)
    dist.broadcast(shared, 0)
    return float(shared)


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """Approximate the nearest (semi-)orthogonal matrices [n, rows, columns] by four quintic Newton-Schulz steps.

    The result is scaled so that an update changes tall matrices as much as wide ones (the Muon rule).
    """
    rows, columns = matrices.shape[1:]
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices / (matrices.flatten(1).norm(dim=1).view(-1, 1, 1) + 1e-7)
    if rows > columns:
        x = x.transpose(1, 2)
    for _ in range(4):
        gram = x @ x.transpose(1, 2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    if rows > columns:
        x = x.transpose(1, 2)
    return x * max(1.0, rows / columns) ** 0.5
