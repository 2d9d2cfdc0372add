"""Predicts the time of a run on 1 to 64 GPUs in every possible layout, from the time of one device and link bandwidths.

    python bench/scaling.py                                            # two cases, from a published time on one GPU
    python bench/scaling.py --case wan22_720p --step-seconds 14.2      # from a time measured on yours (bench/loop.py)
    python bench/scaling.py --node-gbs 450 --network-gbs 50 --fixed-seconds 19

Nothing is measured. Compute is the seconds per step of one device, divided by floating-point operations, which torch
counts on a transformer without weights. Communication is the bytes of the formulas in hydrarun/acceleration/parallel,
divided by the bandwidth per GPU: within a node if the group fits, otherwise between nodes. Latencies and the lower
efficiency of small kernels are ignored, and only the ring's transfers overlap with compute. Real machines are slower.
Published times are shown for comparison.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from hydrarun.models.qwen_image import QwenImageTransformer
from hydrarun.models.transformer import Inputs, Transformer
from hydrarun.models.wan import WanTransformer

NODE = 8  # GPUs
BYTES = 2  # of an activation: bfloat16


@dataclass(frozen=True, eq=False)
class Case:
    """One request. `dim`, `heads`, `blocks`: of the transformer; `spread`: whether text is sharded like the latents."""

    name: str
    steps: int
    tokens: int
    text: int
    dim: int
    heads: int
    blocks: int
    spread: bool
    reduces: int  # activations that tensor parallel sums, per block
    step_seconds: float | None
    published: dict[int, float]
    source: str


CASES = (
    Case(
        *("qwen_2048", 50, 128 * 128, 40, 3072, 24, 60, True, 2),
        step_seconds=112.5 / 50,
        published={1: 112.5, 2: 65.2, 4: 39.6, 8: 30.8},
        source="vLLM-Omni, H800, SDPA, Ulysses; whole requests, text encoder and VAE included",
    ),
    Case(
        *("wan22_720p", 40, 21 * 45 * 80, 512, 5120, 40, 40, False, 3),
        step_seconds=None,
        published={},
        source="none found at 81 frames; one device's time: the first case's, by floating-point operations",
    ),
)


@dataclass(frozen=True)
class Layout:
    """The degree of each method."""

    cfg: int
    ring: int
    ulysses: int
    tensor: int

    @property
    def ranks(self) -> int:
        return self.cfg * self.ring * self.ulysses * self.tensor

    def __str__(self) -> str:
        named = (("cfg", self.cfg), ("ring", self.ring), ("ulysses", self.ulysses), ("tp", self.tensor))
        return " x ".join(f"{name}{degree}" for name, degree in named if degree > 1) or "one device"


@cache
def flops(case: Case) -> tuple[float, float]:
    """Return the floating-point operations of one forward and attention's share, counted on the meta device."""
    text_dim = 3584 if case.spread else 4096
    inputs: dict[str, Any] = {"encoder_hidden_states": torch.empty(1, case.text, text_dim, device="meta")}
    with torch.device("meta"):
        model: Transformer = QwenImageTransformer() if case.spread else WanTransformer()
        if case.spread:
            latents = torch.empty(1, case.tokens, 64)
            inputs |= {"encoder_hidden_states_mask": None, "grid": (1, 128, 128)}
        else:
            latents = torch.empty(1, 16, 21, 90, 160)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.predict_branch(Inputs(latents, torch.empty(1), {"positive": inputs}), "positive")
    counts = counter.get_flop_counts()["Global"]
    # attention's products are the only batched ones; the meta device has no fused kernel
    attention = sum(count for operation, count in counts.items() if "bmm" in str(operation))
    return counter.get_total_flops(), attention / counter.get_total_flops()


def layouts(case: Case, ranks: int) -> Iterator[Layout]:
    """Yield every layout with `ranks` ranks. Heads are not split, and tensor parallelism stays within a node."""
    powers = [1, 2, 4, 8, 16, 32, 64]
    for cfg, ring, ulysses, tensor in itertools.product((1, 2), powers, powers, (1, 2, 4, 8)):
        layout = Layout(cfg, ring, ulysses, tensor)
        if layout.ranks == ranks and ulysses * tensor <= case.heads:
            yield layout


def step_seconds(case: Case, layout: Layout, one_device: float, node: float, network: float) -> float:
    """Return the seconds of one step with two branches: divided compute plus transfers.

    The bytes follow the formulas in hydrarun/acceleration/parallel. The ring's transfers overlap with attention.
    """
    parts = layout.ring * layout.ulysses
    forward = one_device / 2 / (parts * layout.tensor)
    joint = case.tokens + (case.text if case.spread else 0)
    here = joint / parts * case.dim * BYTES  # bytes of one rank's activations [s, D]

    def link(span: int) -> float:
        return node if span <= NODE else network

    exchanged = case.blocks * 4 * (layout.ulysses - 1) / layout.ulysses * here / layout.tensor
    forward += exchanged / link(layout.tensor * layout.ulysses)
    passed = case.blocks * 2 * (layout.ring - 1) * here / layout.tensor
    forward += max(0.0, passed / link(layout.tensor * parts) - forward * flops(case)[1])
    summed = case.blocks * case.reduces * 2 * (layout.tensor - 1) / layout.tensor * here
    forward += summed / link(layout.tensor)
    forward += (parts - 1) * here / link(layout.tensor * parts) if parts > 1 else 0.0
    prediction = case.tokens * 64 * BYTES / link(layout.ranks) if layout.cfg > 1 else 0.0
    return forward * (2 // layout.cfg) + prediction


def show(case: Case, one_device: float, arguments: argparse.Namespace, console: Console) -> None:
    """Print the table of a case: for each number of GPUs the best three layouts, and Ulysses alone."""
    node, network = arguments.node_gbs * 1e9, arguments.network_gbs * 1e9
    table = Table("GPUs", "layout", "s per step", "s per run", "speed-up", "published s")
    whole = case.steps * one_device + arguments.fixed_seconds
    for ranks in (1, 2, 4, 8, 16, 32, 64):
        found = sorted(layouts(case, ranks), key=lambda one: step_seconds(case, one, one_device, node, network))
        shown = dict.fromkeys([*found[:3], *(one for one in found if one == Layout(1, 1, ranks, 1))])
        for place, layout in enumerate(shown):
            step = step_seconds(case, layout, one_device, node, network)
            total = case.steps * step + arguments.fixed_seconds
            alone = layout == Layout(1, 1, ranks, 1)
            published = f"{case.published[ranks]:.1f}" if alone and ranks in case.published else ""
            best = "* " if place == 0 else "  "
            table.add_row(
                str(ranks) if place == 0 else "",
                best + str(layout),
                f"{step:.3f}",
                f"{total:.1f}",
                f"{whole / total:.2f}",
                published,
            )
    console.print(f"\n{case.name}: {case.steps} steps, {case.tokens} latent tokens, two branches; * the best layout")
    console.print(table)
    console.print(f"published: {case.source}", soft_wrap=True, highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [case.name for case in CASES]
    parser.add_argument("--case", choices=names, nargs="+", default=names)
    parser.add_argument("--step-seconds", type=float, help="seconds per step of one device, both branches")
    parser.add_argument(
        "--fixed-seconds", type=float, default=0.0, help="seconds that are not split across ranks: encoding, VAE"
    )
    parser.add_argument("--node-gbs", type=float, default=200.0, help="GB/s that a GPU sends inside a node (NVLink)")
    parser.add_argument("--network-gbs", type=float, default=50.0, help="GB/s that a GPU sends to another node")
    arguments = parser.parse_args()
    console = Console()
    first = CASES[0]
    assert first.step_seconds is not None
    rate = 2 * flops(first)[0] / (first.step_seconds - arguments.fixed_seconds / first.steps)
    for case in CASES:
        if case.name in arguments.case:
            work = 2 * flops(case)[0]
            one_device = arguments.step_seconds or work / rate
            show(case, one_device, arguments, console)
            console.print(
                f"one device: {one_device:.3f} s per step for {work / 1e12:.0f} TFLOP"
                f" ({work / one_device / 1e12:.0f} TFLOP/s); links {arguments.node_gbs:.0f} GB/s in a node of {NODE},"
                f" {arguments.network_gbs:.0f} GB/s between nodes: stated, not measured",
                soft_wrap=True,
                highlight=False,
            )


if __name__ == "__main__":
    main()
