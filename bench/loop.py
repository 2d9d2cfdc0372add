"""Our denoising loop against diffusers' own: same checkpoint, same inputs, one process, alternating.

    python bench/loop.py                              # the shipped demo model
    python bench/loop.py --path FOLDER --size 256     # any Qwen-Image checkpoint in diffusers layout

Both loops are timed from step to step, without their first step, which pays for warming up.
"""

from __future__ import annotations

import argparse
import itertools
import platform
import statistics
import time

import torch
from diffusers import QwenImagePipeline
from rich.console import Console
from rich.table import Table

import hydrarun
from hydrarun.memory.hub import resolve
from hydrarun.request import make_state
from hydrarun.runner import Runner
from hydrarun.state import State
from hydrarun.timing import Timings


def our_steps(runner: Runner) -> tuple[list[float], State]:
    """Seconds of each step but the first, and the finished state."""
    timings = Timings(runner.built.parts.device)
    state = runner.draw(make_state(runner.config["sampling"]), timings)
    return timings.steps[1:], state


def their_steps(pipeline: QwenImagePipeline, state: State) -> tuple[list[float], torch.Tensor]:
    """The same of diffusers' loop, and its final latents."""
    ends: list[float] = []

    def on_step_end(pipe: object, step: int, timestep: object, tensors: dict) -> dict:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        ends.append(time.perf_counter())
        return tensors

    guided = {"negative_prompt": state.negative_prompts} if state.true_cfg_scale > 1 else {}
    latents = pipeline(
        prompt=state.prompts,
        true_cfg_scale=state.true_cfg_scale,
        height=state.height,
        width=state.width,
        num_inference_steps=state.num_inference_steps,
        generator=[torch.Generator().manual_seed(seed) for seed in state.seeds],
        callback_on_step_end=on_step_end,
        output_type="latent",
        **guided,
    ).images
    return [b - a for a, b in itertools.pairwise(ends)], latents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", default="package:demo", help="checkpoint (default: the shipped demo model)")
    parser.add_argument("--size", type=int, default=128, help="height and width in pixels")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=7, help="times that each loop runs")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    runner = hydrarun.load(
        "model=qwen_image",
        f"model.path={arguments.path}",
        "sampling.prompt=a large red circle above a small blue square on a yellow background",
        f"sampling.num_inference_steps={arguments.steps}",
        f"sampling.height={arguments.size}",
        f"sampling.width={arguments.size}",
    )
    parts = runner.built.parts
    pipeline = QwenImagePipeline.from_pretrained(resolve(runner.config["model"]).folder, torch_dtype=parts.dtype).to(
        parts.device
    )
    pipeline.set_progress_bar_config(disable=True)

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
        f"{arguments.rounds} rounds of {arguments.steps} steps with guidance at {arguments.size} x {arguments.size},"
        f" {parts.dtype}, {parts.device}, {arguments.threads} threads, {platform.machine()}, torch {torch.__version__};"
        f" largest difference of final latents {difference:.1e}",
        soft_wrap=True,
        highlight=False,
    )


if __name__ == "__main__":
    main()
