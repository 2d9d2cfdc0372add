"""Shared by both calibrations: draws prompts with a given cache, and writes an option of `cache`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from hydrarun.acceleration.cache.base import Cache
from hydrarun.core.files import write_atomically
from hydrarun.core.progress import Progress
from hydrarun.core.timing import Timings
from hydrarun.engine.runner import Runner
from hydrarun.pipeline.stage import Stage, run_stages
from hydrarun.pipeline.state import State


class TrialRunner:
    """Runs a runner's stages in parts, so that a prompt is encoded once and denoised many times."""

    def __init__(self, config: dict[str, Any], progress: Progress) -> None:
        """Load the model. Raises what `Runner` raises."""
        self.config, self.progress = config, progress
        self.runner = Runner(config, progress)
        self.parts = self.runner.built.parts
        self.parts.progress = Progress(quiet=True)  # a calibration shows its own progress
        self.images = self.runner.read_images(config)
        stages = self.runner.built.stages
        # the scheduler counts its steps, so the stage that restarts it runs again with every loop
        loop = next((index for index, stage in enumerate(stages) if "timesteps" in stage.gives), 0)
        end = 1 + max((index for index, stage in enumerate(stages) if stage.phase == "denoise"), default=loop)
        self.before, self.loop, self.after = stages[:loop], stages[loop:end], stages[end:]

    def prepare(self, prompt: str) -> State:
        """Run the stages before the loop."""
        sampling = {**self.config["sampling"], "prompt": prompt}
        return self._run(self.before, self.runner.prepare_state({**self.config, "sampling": sampling}, self.images))

    def denoise(self, prepared: State, cache: Cache) -> State:
        """Return a copy with the final latents, denoised with `cache`."""
        self.parts.cache = cache
        return self._run(self.loop, replace(prepared))

    def decode(self, denoised: State) -> np.ndarray:
        """Decode a copy and return its frames, uint8 `[N, F, H, W, 3]`."""
        return self._run(self.after, replace(denoised)).frames

    def _run(self, stages: Sequence[Stage], state: State) -> State:
        run_stages(stages, state, self.parts, Timings(self.parts.device))
        return state


def format_prompt_count(prompts: Sequence[str]) -> str:
    """Format a number of prompts: `1 prompt`, `2 prompts`…"""
    return f"{len(prompts)} prompt{'' if len(prompts) == 1 else 's'}"


def format_entry(comment: str, key: str, value: Any, indent: int) -> list[str]:
    """Format a field of YAML below the comment that explains it."""
    # strings are quoted: a fingerprint may look like a number
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, str) else _format_flow(value)
    return [f"{' ' * indent}# {comment}", f"{' ' * indent}{key}: {text}"]


def _format_flow(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000, sort_keys=False)
    return text.removesuffix("...\n").strip()


def write_option(file: Path, about: str, defaults: Iterable[str], body: Iterable[str]) -> None:
    """Write an option of `cache`: a comment, its defaults list, and the lines of its fields."""
    lines = [f"# {about}", "defaults:", *(f"  - {name}" for name in (*defaults, "_self_")), "", *body]
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, ("\n".join(lines) + "\n").encode())
