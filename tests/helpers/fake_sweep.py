"""Finished sweeps, made in milliseconds with the real writer, pictures from a formula and given timings."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from hydrarun.config.compose import compose_unchecked
from hydrarun.core.quoting import quote_overrides
from hydrarun.outputs.writer import OutputWriter
from tests.helpers import facts

SIDE = 64
FACTS = {
    "weights": {"path": "package:demo", "revision": None, "fingerprint": "0123abcd"},
    **facts.PLAIN,
    "versions": {"hydrarun": "0.1.0", "torch": "2.13.0"},
    "hardware": {"cpu": "a cpu", "torch_threads": 1},
}


@cache
def _composed(overrides: tuple[str, ...]) -> dict[str, Any]:
    small = ["sampling.num_inference_steps=4", f"sampling.height={SIDE}", f"sampling.width={SIDE}"]
    return compose_unchecked(quote_overrides([*small, *overrides]))[0]


def configuration(overrides: Sequence[str]) -> dict[str, Any]:
    """Return the configuration of the command, at 64 x 64 pixels and four steps."""
    return copy.deepcopy(_composed(tuple(overrides)))


def picture(seed: int, off: int = 0) -> np.ndarray:
    """Return smooth colours, uint8 `[64, 64, 3]`; `off` is added to a square of 8 x 8 pixels."""
    ramp = np.arange(SIDE, dtype=np.int32) * 2
    pixels = np.stack(np.broadcast_arrays(ramp[:, None] + seed, ramp[None, :], np.int32(100)), -1)
    pixels[:8, :8] += off
    return pixels.astype(np.uint8)


def timings(step: float = 0.1, load: float = 0.0, first: float = 0.5) -> dict[str, Any]:
    """Return the timings of four steps; the first is longer."""
    steps = [first, step, step, step]
    return {
        "load_s": load,
        "warmup_s": 0.0,
        "compile_s": 0.0,
        "encode_s": 0.02,
        "denoise_s": sum(steps),
        "decode_s": 0.03,
        "steps_s": steps,
        "total_s": load + sum(steps) + 0.06,
    }


def measured(step: float = 0.1, load: float = 0.0, skipped: Sequence[int] = ()) -> dict[str, Any]:
    """Return the results that a run passes to the writer in addition to its pictures."""
    computed = [number for number in range(4) if number not in skipped]
    branch = {"computed": computed, "skipped": list(skipped)}
    return {
        "timings": timings(step, load),
        "memory": {"peak_host_bytes": 3 * 2**29, "peak_device_bytes": 0},
        "cache": {
            "steps": {"transformer": {"positive": branch, "negative": {"computed": [0], "skipped": [1, 2, 3]}}},
            "blocks": {"run": 6 * len(computed), "all": 24},
            "computed_step_s": 0.2,
            "skipped_step_s": None,
        },
    }


def add(
    sweep: Path,
    name: str,
    overrides: Sequence[str],
    pixels: Sequence[np.ndarray] = (),
    results: dict[str, Any] | None = None,
    error: BaseException | None = None,
) -> Path:
    """Write a finished point with these outputs and ascending seeds, or a failed point with `error`."""
    folder = hydra(sweep, name, overrides)
    config = configuration(overrides)
    if pixels and pixels[0].ndim == 4:
        config["output"] = {**config["output"], "format": config["output"]["format"], "fps": 8}
    writer = OutputWriter(folder, config, FACTS, metadata=True)
    for place, drawn in enumerate(pixels):
        sampling = config["sampling"]
        writer.save(drawn, sampling["prompt"], sampling["negative_prompt"], sampling["seed"] + place, {})
    results = results or measured()
    if error is None:
        writer.finish(results)
    else:
        writer.fail(error, results)
    return folder


def hydra(sweep: Path, name: str, overrides: Sequence[str]) -> Path:
    """Write a killed point, which has only the record of Hydra."""
    folder = sweep / name
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(list(overrides), allow_unicode=True))
    return folder


def grid(sweep: Path) -> Path:
    """Write two caches x two seeds with four steps. Cached pictures differ in a corner of 64 pixels, by 10 and 3."""
    for number, (cache_name, seed) in enumerate((c, s) for c in ("none", "teacache") for s in (1, 2)):
        off = 0 if cache_name == "none" else {1: 10, 2: 3}[seed]
        skipped = () if cache_name == "none" else (1, 2)
        results = measured(0.1 if cache_name == "none" else 0.05, load=1.0 if number == 0 else 0.0, skipped=skipped)
        add(sweep, str(number), [f"cache={cache_name}", f"sampling.seed={seed}"], [picture(seed, off)], results)
    return sweep


def change(folder: Path, **changes: Any) -> None:
    """Change values in a point's run.json; None removes a key."""
    file = folder / "run.json"
    record = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in record.items() if value is not None}))
