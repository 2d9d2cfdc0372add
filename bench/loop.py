"""Compares our denoising loop with diffusers': same checkpoint, same inputs, one process, alternately.

    python bench/loop.py                                                           # the shipped demo model
    python bench/loop.py model=flux_dev model.path=FOLDER sampling.prompt="a cat"   # any model option
    python bench/loop.py --rows plain bfloat16                                     # some of the rows

Rows: ours with the given options (`plain`), compiled, in bfloat16, quantized, offloaded; diffusers' plain and in
bfloat16. Ratio and difference are to diffusers' loop in the same dtype. The time of a round is the median of its steps.
Every row has its own weights; if memory is short, select rows.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measuring import Drawn, asked, difference, in_turns, keep, machine, missing, ratio, theirs

from hydrarun.config.compose import compose_config
from hydrarun.core.tables import Table, format_markdown, format_plain
from hydrarun.core.timing import Timings
from hydrarun.engine.runner import Runner
from hydrarun.pipeline.components import quiet_libraries
from hydrarun.pipeline.state import State

REFERENCE, NARROW = "diffusers", "diffusers bfloat16"
#: our rows, with the overrides they add
ROWS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "compiled": ("compile=blocks",),
    "bfloat16": ("dtype=bfloat16",),
    "int8_weight_only": ("quantization=int8_weight_only",),
    "offload=text_encoder": ("offload=text_encoder",),
    "offload=modulation": ("offload=modulation",),
    "offload=disk": ("offload=disk",),
    "offload=model": ("offload=model",),
    "offload=layerwise": ("offload=layerwise",),
}
HEADER = ("loop", "ms per step", "min - max", "ratio to diffusers", "difference")


class Loops:
    """The runner of each row, and diffusers' pipelines by dtype, built at their first use."""

    def __init__(self, overrides: Sequence[str]) -> None:
        self.overrides = overrides
        self.runners: dict[str, Runner] = {}
        self.pipelines: dict[torch.dtype, Any] = {}

    def runner(self, name: str) -> Runner:
        """Return the runner of a row. Raises `UsageError` for incompatible settings."""
        if name not in self.runners:
            self.runners[name] = Runner(compose_config([*self.overrides, *ROWS[name]]))
        return self.runners[name]

    def draw(self, name: str) -> Drawn:
        """Run our row of that name, or diffusers' loop."""
        return self.ours(name) if name in ROWS else self.diffusers("bfloat16" if name == NARROW else "plain")

    def ours(self, name: str) -> Drawn:
        runner = self.runner(name)
        timings = Timings(runner.built.parts.device)
        state = runner.draw(self.state(name), timings)
        return Drawn(timings.steps, state.latents)

    def state(self, name: str) -> State:
        runner = self.runner(name)
        return runner.prepare_state(runner.config, runner.read_images(runner.config))

    def diffusers(self, name: str) -> Drawn:
        """Run the same request with diffusers' pipeline, in the dtype of our row `name`."""
        parts, state = self.runner(name).built.parts, self.state(name)
        if parts.dtype not in self.pipelines:
            self.pipelines[parts.dtype] = reference(self.runner(name))
        pipeline = self.pipelines[parts.dtype]
        texts = {"prompt": state.prompts, "negative_prompt": state.negative_prompts}
        given = asked(pipeline, state, **texts, image=state.input_images[:1] or None)
        return theirs(pipeline, pipeline.transformer, given, parts.device)

    def beside(self, name: str) -> str:
        """Return the name of diffusers' loop in the dtype of the row."""
        if name not in ROWS:
            return name
        same = self.runner(name).built.parts.dtype == self.runner("plain").built.parts.dtype
        return REFERENCE if same else NARROW


def reference(runner: Runner) -> Any:
    """Load diffusers' pipeline from the same checkpoint, with our processor, because theirs may need torchvision."""
    parts = runner.built.parts
    ours = {"processor": parts.pipeline.processor} if hasattr(parts.pipeline, "processor") else {}
    kinds = {"default": parts.dtype, "vae": parts.pipeline.vae.dtype}
    with quiet_libraries():
        pipeline = type(parts.pipeline).from_pretrained(runner.built.source.folder, torch_dtype=kinds, **ours)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(parts.device)


def measure(loops: Loops, rows: Sequence[str], rounds: int) -> tuple[Table, str]:
    """Return the table, and the reasons for missing rows."""
    found, reasons = in_turns({name: partial(loops.draw, name) for name in rows}, rounds)
    if REFERENCE not in found:
        raise SystemExit(f"{REFERENCE}: {reasons[REFERENCE]}")
    lines = []
    for name, drawn in found.items():
        beside = found[loops.beside(name)]
        values, others = ([statistics.median(one.steps) for one in each] for each in (drawn, beside))
        low, high = min(values) * 1000, max(values) * 1000
        median, share = f"{statistics.median(values) * 1000:.2f}", f"{ratio(values, others):.3f}"
        lines.append((name, median, f"{low:.2f} - {high:.2f}", share, f"{difference(drawn, beside):.1e}"))
    runner, state = loops.runner("plain"), loops.state("plain")
    parts = runner.built.parts
    title = (
        f"{runner.config['model']['name']}, {state.width} x {state.height}, branches"
        f" {', '.join(parts.guidance.branches(state))}, {state.num_inference_steps} steps, {rounds} rounds,"
        f" {str(parts.dtype).removeprefix('torch.')} on {parts.device}"
    )
    return Table(title, HEADER, lines), missing(reasons)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="as for `hydrarun` (default: the shipped demo model)")
    parser.add_argument("--rows", choices=ROWS, nargs="+", default=tuple(ROWS))
    parser.add_argument("--rounds", type=int, default=7, help="rounds of each loop, after a warm-up round")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--docs", type=Path, help="a page with the marks <!-- bench/loop.py --> and <!-- end -->")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    loops = Loops(arguments.overrides)
    where = machine(loops.runner("plain").built.parts.device)
    narrow = [NARROW] if "bfloat16" in arguments.rows else []
    table, said = measure(loops, list(dict.fromkeys(("plain", REFERENCE, *arguments.rows, *narrow))), arguments.rounds)
    below = f"{said} Measured on {where}.".strip()
    print(f"\n{format_plain(table)}\n\n{below}")
    if arguments.docs:
        keep(arguments.docs, "bench/loop.py", f"{format_markdown(table)}\n\n{below}")


if __name__ == "__main__":
    main()
