"""Measures savings and quality of every cache: forwards, wall time, PSNR, SSIM, accuracy, compared with fewer steps.

    python bench/cache.py                       # the shipped demo model at 24 and 50 steps, and the wall times
    python bench/cache.py --docs docs/cache.md  # the same, written between the marks of the page
    python bench/cache.py --only wall           # a larger transformer with random weights: what a skipped step costs

Each prompt is drawn plain and with the cache, alternately; a wall ratio is the median over the prompts. Each row also
has the baseline to beat: the plain run with as many steps as the blocks of the cache pay for.
"""

from __future__ import annotations

import argparse
import platform
import random
import re
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import keep

from hydrarun.acceleration.cache.base import Cache, NoCache, Schedule
from hydrarun.config.compose import compose_config, compose_unchecked
from hydrarun.config.targets import instantiate
from hydrarun.core.progress import Progress
from hydrarun.core.tables import Table, format_markdown, format_plain
from hydrarun.engine.calibration.teacache import fit_polynomials, record_changes
from hydrarun.engine.calibration.trial import TrialRunner
from hydrarun.models.qwen_image import QwenImageTransformer
from hydrarun.models.transformer import Inputs, Step
from hydrarun.outputs.quality.metrics import compare_outputs, measure_accuracy, summarize_values
from hydrarun.outputs.quality.scene_judge import sample_held_out_prompts
from hydrarun.outputs.quality.scenes import caption_scene, sample_scene
from hydrarun.pipeline.state import State

PREDICTORS = ("", " cache/predictor=taylor")
SECOND_ORDER = " cache/predictor=taylor cache.predictor.order=2"
DENSITIES = ("slow", "medium", "fast", "ultra")
OPTIONS = (
    *(f"cache=teacache cache.gate.threshold={value}{how}" for value in (0.05, 0.1, 0.2) for how in PREDICTORS),
    *(f"cache=first_block cache.gate.threshold={value}{how}" for value in (0.06, 0.12) for how in PREDICTORS),
    *(f"cache=every_n{how}" for how in (*PREDICTORS, SECOND_ORDER)),
    *(f"cache=every_n cache.gate.n=3{how}" for how in (*PREDICTORS, SECOND_ORDER)),
    *(f"cache=mask cache.gate.density={value}{how}" for value in DENSITIES for how in PREDICTORS),
    "cache=dbcache",
    "cache=dbcache_taylorseer",
    *(f"cache=dbcache_scm_{value}" for value in DENSITIES),
    "cache=dbprune",
)

#: options whose wall time is measured with random weights
WALL = (
    "cache=every_n",
    f"cache=every_n{SECOND_ORDER}",
    "cache=mask cache.gate.density=fast",
    "cache=teacache cache.gate.threshold=0.1",
    "cache=first_block cache.gate.threshold=0.3",
)

HEADER = (
    "option",
    "forwards",
    "blocks",
    "wall",
    "PSNR mean / p95 / worst",
    "SSIM mean / p95 / worst",
    "right",
    "fewer steps",
    "their PSNR",
    "right",
)


class Demo:
    """The demo model on held-out prompts, one picture at a time."""

    def __init__(self, steps: int, count: int) -> None:
        self.steps = steps
        self.prompts = sample_held_out_prompts(count)
        self.draws = TrialRunner(compose_config([f"sampling.num_inference_steps={steps}"]), Progress(quiet=True))
        self.prepared = [self.draws.prepare(prompt) for prompt in self.prompts]
        self.fewer = lru_cache(self.draw_fewer)
        self.plain = self.fewer(steps)

    def draw_fewer(self, steps: int) -> list[np.ndarray]:
        """Draw the pictures of the plain run with `steps` steps."""
        states = [replace(state, num_inference_steps=steps) for state in self.prepared]
        return [self.picture(self.denoise(state, NoCache())[0]) for state in states]

    def denoise(self, prepared: State, cache: Cache) -> tuple[State, float]:
        """Return the final latents and the seconds of the loop."""
        start = time.perf_counter()
        denoised = self.draws.denoise(prepared, cache)
        return denoised, time.perf_counter() - start

    def picture(self, denoised: State) -> np.ndarray:
        """Decode the latents to `[1, H, W, 3]`."""
        return self.draws.decode(denoised)[0]

    def node(self, option: str) -> dict[str, Any]:
        """Return an option's config. Fits TeaCache's coefficients if the model's are for other numbers of steps."""
        node = compose_unchecked([f"sampling.num_inference_steps={self.steps}", *option.split()])[0]["cache"]
        known = (node.get("gate", {}).get("fit") or {}).get("num_inference_steps")
        if known and not known[0] <= self.steps <= known[1]:
            node["gate"]["fit"] = {"coefficients": self.coefficients()}
        return node

    def coefficients(self) -> dict[str, list[float]]:
        """Fit coefficients as `hydrarun calibrate` does."""
        if "made" not in self.__dict__:
            generator = random.Random(7)
            scenes = [sample_scene(generator, held_out=False) for _ in range(20)]
            self.made = fit_polynomials(record_changes(self.draws, [caption_scene(scene) for scene in scenes]))
        return self.made

    def row(self, option: str) -> tuple[str, ...]:
        """Run plain and cached alternately, prompt by prompt, and return a row of the table."""
        cache = instantiate(self.node(option), "cache")
        pictures, ratios, run, in_all, computed, forwards = [], [], 0, 0, 0, 0
        for prepared in self.prepared:
            _, uncached = self.denoise(prepared, NoCache())
            denoised, seconds = self.denoise(prepared, cache)
            pictures.append(self.picture(denoised))
            ratios.append(seconds / uncached)
            blocks = cache.record()["blocks"]
            run, in_all = run + blocks["run"], in_all + blocks["all"]
            computed += sum(map(len, cache.computed.values()))
            forwards += sum(map(len, (*cache.computed.values(), *cache.skipped.values())))
        steps = max(1, round(self.steps * run / in_all))
        psnr, _, right = self.quality(self.fewer(steps))
        ours = self.quality(pictures)
        shares = f"{computed / forwards:.0%}", f"{run / in_all:.0%}"
        return option, *shares, f"{statistics.median(ratios):.2f}", *ours, str(steps), psnr, right

    def quality(self, pictures: Sequence[np.ndarray]) -> tuple[str, str, str]:
        """Format PSNR and SSIM against the plain run, and the judge's accuracy."""
        pairs = [compare_outputs(ours, twin, ("psnr", "ssim")) for ours, twin in zip(pictures, self.plain, strict=True)]
        psnr, ssim = (summarize_values([pair[name] for pair in pairs]).values() for name in ("psnr", "ssim"))
        right = measure_accuracy([frames[0] for frames in pictures], self.prompts)
        return " / ".join(f"{x:.1f}" for x in psnr), " / ".join(f"{x:.4f}" for x in ssim), f"{right:.1%}"

    def rows(self) -> Iterator[tuple[str, ...]]:
        """Yield the repeated plain run, then one row per option."""
        repeated = [self.picture(self.denoise(prepared, NoCache())[0]) for prepared in self.prepared]
        yield "none, drawn again", "100%", "100%", "1", *self.quality(repeated), "", "", ""
        for option in OPTIONS:
            yield self.row(option)


def wall(rounds: int = 3, steps: int = 24) -> Iterator[tuple[str, ...]]:
    """Measure wall time with random weights, plain and cached alternately, and the relative cost of a skipped step."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "num_layers": 24,
        "num_attention_heads": 4,
        "attention_head_dim": 64,
        "axes_dims_rope": (16, 24, 24),
    }
    transformer = QwenImageTransformer(**shape, joint_attention_dim=256).eval()
    plan = Schedule(tuple(Step(index, 1000.0 * (1 - index / steps)) for index in range(steps)))
    for option in WALL:
        node = compose_unchecked(option.split())[0]["cache"]
        if "fit" in node["gate"]:
            node["gate"]["fit"] = {"coefficients": {"transformer": [1.0, 0.0]}}
        cache = instantiate(node, "cache")
        ratios, skipped, seconds = [], [], []
        loop(transformer, NoCache(), plan)
        for _ in range(rounds):
            uncached, own = loop(transformer, NoCache(), plan), loop(transformer, cache, plan)
            results = cache.summarize(own)
            ratios.append(sum(own) / sum(uncached))
            seconds.append(1000 * results["computed_step_s"])
            skipped.append((results["skipped_step_s"] or 0.0) / results["computed_step_s"])
        blocks = cache.record()["blocks"]
        share, ratio = blocks["run"] / blocks["all"], statistics.median(ratios)
        costs = f"{statistics.median(seconds):.0f}", f"{statistics.median(skipped):.1%}"
        yield option, f"{share:.3f}", f"{ratio:.3f}", f"{ratio / share - 1:+.1%}", *costs


@torch.inference_mode()
def loop(transformer: QwenImageTransformer, cache: Cache, plan: Schedule) -> list[float]:
    """Return the seconds of each step of a request whose latents move from noise to a fixed picture."""
    generator = torch.Generator().manual_seed(1)
    noise, picture = (torch.randn(1, 256, 64, generator=generator) for _ in range(2))
    text = {"encoder_hidden_states": torch.randn(1, 32, 256, generator=generator), "encoder_hidden_states_mask": None}
    seconds = []
    cache.start(plan, ["positive"], None)
    for step in plan.steps:
        level = step.timestep / 1000
        latents, times = level * noise + (1 - level) * picture, torch.tensor([step.timestep])
        start = time.perf_counter()
        transformer(Inputs(latents, times, {"positive": {**text, "grid": (1, 16, 16)}}), step, cache)
        seconds.append(time.perf_counter() - start)
    cache.end()
    return seconds


def tables(arguments: argparse.Namespace) -> Iterator[Table]:
    """Yield the requested tables; rows are printed as they are measured."""
    for steps in () if arguments.only == "wall" else arguments.steps:
        title = f"{steps} steps, the demo model, guidance 2, {arguments.prompts} held-out prompts"
        yield Table(title, HEADER, [shown(row) for row in Demo(steps, arguments.prompts).rows()])
    if arguments.only != "demo":
        header = ("option", "blocks run", "wall", "wall / blocks run", "ms, computed step", "skipped / computed step")
        yield Table(
            "Wall time, 24 blocks of width 256 with random weights, 256 image tokens, 24 steps",
            header,
            [shown(row) for row in wall()],
        )


def shown(row: tuple[str, ...]) -> tuple[str, ...]:
    print("  ".join(row), flush=True)
    return row


def machine() -> str:
    """Describe the machine."""
    return f"Measured on {platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, float32."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("demo", "wall"), help="one of the two parts")
    parser.add_argument("--steps", type=int, nargs="+", default=(24, 50))
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--docs", type=Path, help="a page with marks <!-- bench/cache.py: 24 steps -->, <!-- end -->")
    arguments = parser.parse_args()
    for table in tables(arguments):  # each table is written as soon as it is complete
        print(f"\n{format_plain(table)}\n\n{machine()}\n", flush=True)
        if arguments.docs:
            name = re.sub(r",.*", "", table.title)
            keep(arguments.docs, f"bench/cache.py: {name}", f"{format_markdown(table)}\n\n{machine()}")


if __name__ == "__main__":
    main()
