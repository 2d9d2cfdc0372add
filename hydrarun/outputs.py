"""Writes what a run made: one PNG per picture with its recipe inside, and run.json. docs/outputs.md has every key."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
import unicodedata
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from hydrarun.errors import RunError
from hydrarun.media import png
from hydrarun.provenance import config_hash, redact, redact_text

FORMAT = 1  # of run.json and of the metadata; grows when a key changes its meaning

SLUG_LENGTH = 40

# the part of `sampling` that says which pictures a run draws, beside how
WHICH = ("prompt", "negative_prompt", "seed", "num_images_per_prompt")


class OutputWriter:
    """Writes the pictures of one run into its directory, in the order of `save` calls, and closes with run.json."""

    def __init__(self, run_dir: Path, config: dict[str, Any], facts: dict[str, Any], metadata: bool):
        """`config`: the resolved configuration; `metadata`: whether each file carries its recipe.

        `facts`: what the run really used: weights {path, revision, fingerprint}, device, dtype, attention, compile,
        versions, hardware.
        """
        self.run_dir = run_dir
        self.config = redact(_with_absolute_model_path(config))
        self.facts = redact(facts)
        self.metadata = metadata
        self.config_hash = config_hash(self.config)
        self.created = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self.outputs: list[dict[str, Any]] = []
        self.drawn = 0
        self.save_s = 0.0
        run_dir.mkdir(parents=True, exist_ok=True)

    def save(
        self, pixels: np.ndarray, prompt: str, negative_prompt: str | None, seed: int, timings: dict[str, Any]
    ) -> dict[str, Any]:
        """Write the next picture (uint8 [H, W, 3]) and return its record; `timings`: those known by now, in seconds.

        Raises RunError for a picture that cannot be one: black, or a single colour.
        """
        start = time.perf_counter()
        index = self.drawn
        self.drawn += 1  # a refused picture keeps its place: replay finds the others by theirs
        _refuse_constant(pixels, prompt, seed)
        record = {
            "index": index,
            "path": f"{index:04d}-{slug(prompt)}-{seed}-{self.config_hash}.png",
            "prompt": prompt,
            "negative_prompt": negative_prompt,
            "seed": seed,
            "pixels_sha256": pixels_sha256(pixels),
            "width": pixels.shape[1],
            "height": pixels.shape[0],
        }
        text = self._chunks(index, record, timings) if self.metadata else {}
        data = png.encode(pixels, text)
        write_atomically(self.run_dir / record["path"], data)
        record["sha256"] = hashlib.sha256(data).hexdigest()
        self.outputs.append(record)
        self.save_s += time.perf_counter() - start
        return record

    def finish(self, timings: dict[str, Any], memory: dict[str, int]) -> dict[str, Any]:
        """Write run.json and return it. `timings` in seconds, `memory` in bytes; `save_s` is added here."""
        return self._write_run({"status": "complete"}, timings, memory)

    def fail(self, error: BaseException, timings: dict[str, Any], memory: dict[str, int]) -> dict[str, Any]:
        """Write run.json for a run that broke off: what was already made stays and is listed."""
        message = redact_text(str(error))
        return self._write_run(
            {"status": "failed", "error": {"type": type(error).__name__, "message": message}}, timings, memory
        )

    def _write_run(self, status: dict[str, Any], timings: dict[str, Any], memory: dict[str, int]) -> dict[str, Any]:
        record = {
            "format": FORMAT,
            **status,
            "created": self.created,
            "config_hash": self.config_hash,
            "outputs": self.outputs,
            "timings": {**timings, "save_s": self.save_s},
            "memory": memory,
            **self.facts,
            "config": self.config,
        }
        write_atomically(self.run_dir / "run.json", json.dumps(record, indent=2, ensure_ascii=False).encode() + b"\n")
        return record

    def _chunks(self, index: int, record: dict[str, Any], timings: dict[str, Any]) -> dict[str, str]:
        sampling = self.config["sampling"]
        alone = {
            "prompt": record["prompt"],
            "negative_prompt": record["negative_prompt"],
            "seed": record["seed"],
            "num_images_per_prompt": 1,
        }
        recipe = {
            "format": FORMAT,
            "config": {**self.config, "sampling": {**sampling, **alone}},
            # A picture drawn alone equals the one drawn in its batch only to rounding (other matrix shapes), so
            # replay redraws the batch.
            "batch": {"index": index, "sampling": {key: sampling.get(key) for key in WHICH}},
            "config_hash": self.config_hash,
            "pixels_sha256": record["pixels_sha256"],
            "created": self.created,
            "timings": timings,
            **self.facts,
        }
        return {
            "parameters": parameters(self.config, self.facts, record),
            png.CHUNK: json.dumps(recipe, ensure_ascii=False),
        }


def parameters(config: dict[str, Any], facts: dict[str, Any], record: dict[str, Any]) -> str:
    """The AUTOMATIC1111 text: the prompt, the negative prompt, then one line of `Key: value` pairs."""
    sampling, model = config["sampling"], config["model"]
    lines = [record["prompt"]]
    if (record["negative_prompt"] or "").strip():
        lines.append(f"Negative prompt: {record['negative_prompt']}")
    settings = {
        "Steps": sampling["num_inference_steps"],
        "Sampler": facts["scheduler"],
        "CFG scale": sampling["true_cfg_scale"],
        "Seed": record["seed"],
        "Size": f"{record['width']}x{record['height']}",
        "Model": model["name"],
        "Version": f"hydrarun {facts['versions']['hydrarun']}",
    }
    lines.append(", ".join(f"{key}: {value}" for key, value in settings.items()))
    return "\n".join(lines)


def slug(prompt: str) -> str:
    """The prompt as a part of a file name: a-z, 0-9 and `-`, at most 40 characters, whole words where they fit.

    Accents are dropped; a prompt without any Latin letter or digit becomes `picture`.
    """
    plain = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode().lower()
    words = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")
    if len(words) > SLUG_LENGTH:
        whole = words[: SLUG_LENGTH + 1].rpartition("-")[0]
        words = whole or words[:SLUG_LENGTH]
    return words or "picture"


def pixels_sha256(pixels: np.ndarray) -> str:
    """sha256 over the RGB bytes, row by row from the top."""
    return hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()


def write_atomically(path: Path, data: bytes) -> None:
    """Write `path` so that it is never seen half written, not even after a crash."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _refuse_constant(pixels: np.ndarray, prompt: str, seed: int) -> None:
    spread = int(np.ptp(pixels, axis=(0, 1)).max())
    if spread > 1:  # one level is rounding noise, not a picture
        return
    color = "black" if pixels.max() <= 1 else f"one colour, RGB {tuple(int(value) for value in pixels[0, 0])}"
    raise RunError(
        f"the picture for seed {seed} ({prompt[:60]!r}) is all {color}; nothing was written for it. Likely causes: "
        "numbers that overflow (try dtype=bfloat16 or dtype=float32 instead of float16), another attention backend's "
        "fault (try attention=sdpa), or weights that do not belong to this model (see model.path)."
    )


def _with_absolute_model_path(config: dict[str, Any]) -> dict[str, Any]:
    """A relative folder means nothing to whoever reads the record from another one; hub ids stay as they are."""
    path = Path(config["model"]["path"]).expanduser()
    if not path.is_dir():
        return config
    return {**config, "model": {**config["model"], "path": str(path.resolve())}}
