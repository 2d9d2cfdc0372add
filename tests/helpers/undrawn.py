"""Writes a finished run without drawing: files and run.json from the real writer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from hydrarun.outputs.provenance import collect_versions, describe_hardware
from hydrarun.outputs.writer import OutputWriter
from tests.helpers import facts as facts_of_a_run

TIMINGS = {"load_s": 1.0, "steps_s": [0.4, 0.1, 0.2], "total_s": 2.0}
FINGERPRINT = "930362e098623e17"  # of weights/demo


def noise(seed: int) -> np.ndarray:
    """Return a picture, uint8 `[128, 128, 3]`."""
    blocks = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    return blocks.repeat(16, 0).repeat(16, 1)


def draw(config: dict[str, Any], folder: Path, inputs: tuple[dict[str, Any], ...] = (), **more: Any) -> dict[str, Any]:
    """Write a run of `config` with a picture for each prompt, which depends on the seed; return run.json.

    `more`: `timings`, `quality`, `shift` (added to each pixel), or other facts for run.json.
    """
    shift = more.pop("shift", 0)
    measured = {
        "timings": more.pop("timings", TIMINGS),
        "memory": {"peak_host_bytes": 2**30, "peak_device_bytes": 0},
        "cache": {},
        **({"quality": more.pop("quality")} if "quality" in more else {}),
    }
    facts = {
        "weights": {"path": config["model"]["path"], "revision": None, "fingerprint": FINGERPRINT},
        **facts_of_a_run.PLAIN,
        "inputs": list(inputs),
        "versions": collect_versions(),
        "hardware": describe_hardware("cpu"),
        **more,
    }
    writer = OutputWriter(folder, config, facts, metadata=False)
    sampling = config["sampling"]
    prompts = sampling["prompt"] if isinstance(sampling["prompt"], list) else [sampling["prompt"]]
    for index, prompt in enumerate(prompts):
        pixels = np.clip(noise(sampling["seed"] + index).astype(int) + shift, 0, 255).astype(np.uint8)
        writer.save(pixels, prompt, sampling["negative_prompt"], sampling["seed"], {})
    return writer.finish(measured)
