"""Measures the overhead of a sweep point over `runner.generate` of the same picture, alternately, in one process.

    python bench/sweep.py                                      # the shipped demo model, 64 x 64
    python bench/sweep.py sampling.num_inference_steps=8 --rounds 9

Runs sweeps of one and of three points with the weights already loaded. Their difference is two points: Hydra's
composition, checks, drawing, run.json and the files. Prints the time of `runner.generate` and of a point.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import redirect_stderr

import torch
from measuring import machine

from hydrarun.cli.commands.run import run_overrides
from hydrarun.config.compose import compose_config
from hydrarun.engine.ranks import launch
from hydrarun.engine.runner import Runner

DEFAULT = ("device=cpu", "sampling.height=64", "sampling.width=64")


def swept(overrides: Sequence[str], points: int) -> float:
    """Return the seconds of a sweep over `points` seeds, with the weights loaded."""
    seeds = f"sampling.seed={','.join(map(str, range(points)))}"
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as silence, redirect_stderr(silence):
        start = time.perf_counter()
        code = run_overrides([*overrides, seeds, f"hydra.sweep.dir={folder}"], ["-m"])
        seconds = time.perf_counter() - start
    if code:
        raise SystemExit(f"a point failed: python -m hydrarun -m {' '.join(overrides)} {seeds}")
    return seconds


def generated(runner: Runner) -> float:
    """Return the seconds of the same picture, without a sweep."""
    start = time.perf_counter()
    runner.generate(seed=1)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="as for `hydrarun`, without sweep values")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of measurement, after a warm-up round")
    arguments = parser.parse_args()
    overrides = [*DEFAULT, *arguments.overrides]
    runner = Runner(compose_config(overrides))
    rounds = [(generated(runner), swept(overrides, 1), swept(overrides, 3)) for _ in range(arguments.rounds + 1)][1:]
    launch.close_executor()
    bare = statistics.median(bare for bare, _, _ in rounds)
    point = statistics.median((three - one) / 2 for _, one, three in rounds)
    print(f"runner.generate           {bare * 1000:7.0f} ms")
    print(f"an added point of a sweep {point * 1000:7.0f} ms: {(point - bare) * 1000:.0f} ms more")
    print(machine(torch.device("cpu")))


if __name__ == "__main__":
    main()
