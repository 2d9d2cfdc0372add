"""Our denoising loop against diffusers' own: same checkpoint, same inputs, one process, alternating.

    python bench/loop.py                                                           # the shipped demo model
    python bench/loop.py model=flux_dev model.path=FOLDER sampling.prompt="a cat"   # any model option

Both loops are timed from step to step, without their first step, which pays for warming up.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import platform
import statistics
import time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from hydrarun.compose import compose
from hydrarun.request import PLAIN
from hydrarun.runner import Runner
from hydrarun.state import State
from hydrarun.timing import Timings


def our_steps(runner: Runner) -> tuple[list[float], State]:
    """Seconds of each step but the first, and the finished state."""
    timings = Timings(runner.built.parts.device)
    state = runner.draw(runner.state(runner.config, runner.read_images(runner.config)), timings)
    return timings.steps[1:], state


def their_steps(pipeline: Any, state: State) -> tuple[list[float], torch.Tensor]:
    """The same of diffusers' loop, and its final latents."""
    ends: list[float] = []

    def on_step_end(pipe: object, step: int, timestep: object, tensors: dict) -> dict:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        ends.append(time.perf_counter())
        return tensors

    accepted = inspect.signature(pipeline.__call__).parameters
    given = {name: getattr(state, name) for name in PLAIN}
    given |= {"prompt": state.prompts, "negative_prompt": state.negative_prompts, "image": state.input_images[:1]}
    latents = pipeline(
        **{name: value for name, value in given.items() if name in accepted and value not in (None, [])},
        generator=[torch.Generator().manual_seed(seed) for seed in state.seeds],
        callback_on_step_end=on_step_end,
        output_type="latent",
    )[0]
    return [b - a for a, b in itertools.pairwise(ends)], latents


def reference(runner: Runner) -> Any:
    """diffusers' pipeline on the same checkpoint; a processor is ours, as theirs may need torchvision."""
    parts = runner.built.parts
    ours = {"processor": parts.pipeline.processor} if hasattr(parts.pipeline, "processor") else {}
    kinds = {"default": parts.dtype, "vae": parts.pipeline.vae.dtype}
    pipeline = type(parts.pipeline).from_pretrained(runner.built.source.folder, torch_dtype=kinds, **ours)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(parts.device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="as for `hydrarun` (default: the shipped demo model)")
    parser.add_argument("--rounds", type=int, default=7, help="times that each loop runs")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    runner = Runner(compose(arguments.overrides))
    parts = runner.built.parts
    pipeline = reference(runner)

    rounds: dict[str, list[float]] = {"hydrarun": [], "diffusers": []}
    difference = 0.0
    for number in range(arguments.rounds + 1):
        ours, state = our_steps(runner)
        theirs, latents = their_steps(pipeline, state)
        difference = max(difference, (latents - state.latents).abs().max().item())
        if number:  # round 0 warms both up
            rounds["hydrarun"].append(statistics.median(ours))
            rounds["diffusers"].append(statistics.median(theirs))

    ratios = [a / b for a, b in zip(rounds["hydrarun"], rounds["diffusers"], strict=True)]
    table = Table("loop", "ms per step", "min - max of rounds", "ratio to diffusers")
    for name, values in rounds.items():
        ratio = f"{statistics.median(ratios):.3f}" if name == "hydrarun" else "1"
        low, high = min(values) * 1000, max(values) * 1000
        table.add_row(name, f"{statistics.median(values) * 1000:.2f}", f"{low:.2f} - {high:.2f}", ratio)
    console = Console()
    console.print(table)
    console.print(
        f"{runner.config['model']['name']}: {arguments.rounds} rounds of {state.num_inference_steps} steps at"
        f" {state.width} x {state.height}, branches {', '.join(parts.guidance.branches(state))}, {parts.dtype},"
        f" {parts.device}, {arguments.threads} threads, {platform.machine()}, torch {torch.__version__};"
        f" largest difference of final latents {difference:.1e}",
        soft_wrap=True,
        highlight=False,
    )


if __name__ == "__main__":
    main()
