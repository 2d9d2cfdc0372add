"""Compares our denoising loop with diffusers' at full size, with random weights: gains of each acceleration on a GPU.

    python bench/gpu.py                                              # Qwen-Image, 1024 x 1024, guidance, 50 steps
    python bench/gpu.py --model flux_dev --steps 20 --rounds 5       # or wan22_480p
    python bench/gpu.py --docs docs/performance.md                   # the table written into the page
    python bench/gpu.py --device cpu --blocks 2 --heads 2 --size 64 --steps 4    # a small check that it runs

No checkpoint is read (bench/full_size.py). Every step is synchronized. Each row runs once per round, after a warm-up
round. docs/performance.md explains the columns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from full_size import CASES, REFERENCE, ROWS, Bench, Row
from measuring import Drawn, difference, in_turns, keep, machine, missing, ratio

from hydrarun.core.device import DTYPES, synchronize
from hydrarun.core.tables import Table, format_markdown, format_plain
from hydrarun.engine.plan.devices import GIB

HEADER = (
    "row",
    "ms per step",
    "min - max",
    "ratio",
    "peak GiB",
    "floor / measured",
    "difference",
    "skipped step",
)


def matmul_rate(device: torch.device, dtype: torch.dtype, side: int) -> float:
    """Return the floating-point operations per second of the fastest of 20 products of two square matrices."""
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(20):
        synchronize(device)
        start = time.perf_counter()
        a @ b
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * side**3 / min(seconds)


def measure(bench: Bench, rows: Sequence[str], rounds: int, rate: float) -> tuple[Table, str]:
    """Return the table and the text below it: the floor at `rate` operations per second, and why rows are missing."""
    work = bench.work()
    floor = work.flops / rate
    found, reasons = in_turns({name: partial(bench.draw, name) for name in rows}, rounds)
    if REFERENCE not in found:
        raise SystemExit(f"{REFERENCE}: {reasons[REFERENCE]}")
    lines = [line(name, drawn, found[REFERENCE], bench.row(name), floor) for name, drawn in found.items()]
    spread = found[REFERENCE][0].latents.float().std().item()
    said = (
        f"Floor of a step: {work.linear_flops / 1e12:.4g} + {work.attention_flops / 1e12:.4g} (attention) TFLOP at the"
        f" {rate / 1e12:.4g} TFLOP/s that a matrix product reached: {1000 * floor:.2f} ms. The latents' deviation is"
        f" {spread:.2f}."
    )
    return Table(title(bench, rounds), HEADER, lines), f"{said} {missing(reasons)}".strip()


def line(name: str, drawn: Sequence[Drawn], reference: Sequence[Drawn], row: Row, floor: float) -> tuple[str, ...]:
    """Format a row. The time of a round is the mean of its steps, because a cache makes them unequal."""
    values, theirs = ([statistics.mean(one.steps) for one in each] for each in (drawn, reference))
    median = statistics.median(values)
    return (
        name,
        f"{1000 * median:.2f}",
        f"{1000 * min(values):.2f} - {1000 * max(values):.2f}",
        f"{ratio(values, theirs):.3f}",
        f"{row.peak / GIB:.2f}" if row.peak else "",
        f"{floor / median:.0%}",
        f"{difference(drawn, reference):.1e}",
        f"{statistics.median(row.skipped[1:]):.1%}" if row.skipped else "",
    )


def title(bench: Bench, rounds: int) -> str:
    """Return the title of the table."""
    case, state = bench.case, bench.state
    return (
        f"{case.model}, {case.width} x {case.height}{case.note}, {case.text} tokens of text, branches"
        f" {', '.join(state.conditioning)}, {state.num_inference_steps} steps, {rounds} rounds,"
        f" {str(bench.dtype).removeprefix('torch.')}, {bench.weights.depth} blocks"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=CASES, default="qwen_image")
    parser.add_argument("--steps", type=int, default=50, help="an even number: the cache computes half of them")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each row, after a warm-up round")
    parser.add_argument("--rows", choices=ROWS, nargs="+", default=ROWS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--blocks", type=int, help="blocks of each list, for a small run")
    parser.add_argument("--heads", type=int, help="heads of 128 channels, for a small run")
    parser.add_argument("--size", type=int, help="pixels per side, for a small run")
    parser.add_argument("--docs", type=Path, help="a page with the marks <!-- bench/gpu.py: MODEL --> and <!-- end -->")
    arguments = parser.parse_args()
    device, dtype, case = torch.device(arguments.device), DTYPES[arguments.dtype], CASES[arguments.model]
    where = machine(device)
    if arguments.size:
        case = replace(case, width=arguments.size, height=arguments.size)
    bench = Bench(case, arguments.steps, device, dtype, arguments.blocks, arguments.heads)
    rate = matmul_rate(device, dtype, 512 if device.type == "cpu" else 8192)
    rows = list(dict.fromkeys((REFERENCE, *arguments.rows)))
    table, said = measure(bench, rows, arguments.rounds, rate)
    said = f"{said} Measured on {where}."
    print(f"\n{format_plain(table)}\n\n{said}")
    if arguments.docs:
        keep(arguments.docs, f"bench/gpu.py: {arguments.model}", f"{format_markdown(table)}\n\n{said}")


if __name__ == "__main__":
    main()
