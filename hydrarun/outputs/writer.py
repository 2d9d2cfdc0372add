"""Writes pictures, videos and sounds, each with its recipe inside, and run.json. docs/outputs.md lists all keys."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hydrarun.core.errors import RunError
from hydrarun.core.files import expand_home, resolve_path, write_atomically
from hydrarun.core.inputs import image_paths
from hydrarun.outputs.media import frames, kinds, mp4, png, wav
from hydrarun.outputs.provenance import hash_config, redact_config, redact_text
from hydrarun.outputs.run_folder import RECORD_FILE, release_reserve, translate_file_errors

FORMAT = 1  # of run.json and of the metadata; incremented when a key changes its meaning

SLUG_LENGTH = 40

#: by output format, the encoder: from pixels or samples, their record and the embedded texts to the bytes of a file
ENCODERS: dict[str, Callable[[np.ndarray, Mapping[str, Any], Mapping[str, str]], bytes]] = {
    "png": lambda pixels, record, text: png.encode_png(pixels, text),
    "mp4": lambda pixels, record, text: mp4.encode_mp4(pixels, record["fps"], text),
    "wav": lambda samples, record, text: wav.encode_wav(samples, record["sample_rate"], text),
}

# the keys of `sampling` that select the outputs of a run; the others set how they are drawn
WHICH = ("prompt", "negative_prompt", "seed", "num_images_per_prompt")


class OutputWriter:
    """Writes the outputs of one run into its folder, in the order of `save` calls, then run.json."""

    def __init__(
        self,
        run_dir: Path,
        config: dict[str, Any],
        facts: dict[str, Any],
        metadata: bool,
        places: Sequence[int] | None = None,
    ):
        """`config`: the resolved configuration; `metadata`: whether each file carries its recipe.

        `facts`: what the run really used: weights {path, revision, fingerprint}, verified, inputs [{path, sha256,
        width, height}], device, dtype, attention, compile, versions, hardware, and for sounds sample_rate in Hz.
        `places`: for a batch of a larger run, the indices of its pictures in that run; each file name then has the hash
        of the configuration that draws the picture alone.
        """
        self.run_dir = run_dir
        self.config = to_recorded_config(config)
        self.facts = redact_config(
            {**facts, "inputs": [{**image, "path": _make_absolute(image["path"])} for image in facts["inputs"]]}
        )
        self.metadata = metadata
        self.places = places
        self.config_hash = hash_config(self.config)
        self.created = current_timestamp()
        self.outputs: list[dict[str, Any]] = []
        self.drawn = 0
        self.save_s = 0.0
        if places is None:  # the folder of a batch is there; if it was removed, the run ends
            run_dir.mkdir(parents=True, exist_ok=True)

    def save(
        self,
        pixels: np.ndarray,
        prompt: str,
        negative_prompt: str | None,
        seed: int,
        timings: dict[str, Any],
        caption: str | None = None,
        cuts: Sequence[dict[str, Any]] = (),
    ) -> dict[str, Any]:
        """Write the next output (an array of `hydrarun.outputs.media.kinds`) and return its record.

        `timings`: those known so far, in seconds; `caption`: the text that the model used for a blank prompt; `cuts`:
        what the text encoders did not read of the texts. Raises
        RunError for an output that must be wrong (all of one colour, in every layer if it has layers; silence), and for
        a video size that the format cannot hold.
        """
        start = time.perf_counter()
        position = self.drawn
        self.drawn += 1  # a refused picture keeps its index: replay finds the others by their index
        _refuse_constant(pixels, prompt, seed, self.facts)
        output = self.config["output"]
        texts = {"prompt": prompt, "negative_prompt": negative_prompt, "seed": seed}
        index, digest = position, self.config_hash
        if self.places:
            index, digest = self.places[position], hash_config(derive_picture_config(self.config, texts))
        record = {
            "index": index,
            "path": format_file_name(index, prompt, seed, digest, output["format"]),
            **texts,
            **({} if caption is None else {"caption": caption}),
            **({"cuts": [*cuts]} if cuts else {}),
            "pixels_sha256": hash_pixels(pixels),
            **kinds.find_array_kind(pixels).extent(pixels, output, self.facts),
        }
        record |= self._write(pixels, record, BatchPosition(position, digest), timings)
        self.outputs.append(record)
        self.save_s += time.perf_counter() - start
        return record

    def skip(self) -> None:
        """Skip the next picture, which was written before."""
        self.drawn += 1

    def finish(self, measured: dict[str, Any]) -> dict[str, Any]:
        """Write run.json and return it.

        `measured`: timings in seconds (`save_s` is added), memory, cache, and quality if it was measured.
        """
        return self._write_run({"status": "complete"}, measured)

    def fail(self, error: BaseException, measured: dict[str, Any]) -> dict[str, Any]:
        """Write run.json for a run that failed or was interrupted; outputs written so far are kept and listed."""
        return self._write_run(describe_end(error), measured)

    def _write_run(self, status: dict[str, Any], measured: dict[str, Any]) -> dict[str, Any]:
        measured = {**measured, "timings": {**measured["timings"], "save_s": self.save_s}}
        begun = {"created": self.created, "config_hash": self.config_hash, "outputs": self.outputs}
        return write_run(self.run_dir, {**status, **begun, **measured, **self.facts, "config": self.config})

    def _write(
        self, pixels: np.ndarray, record: dict[str, Any], place: BatchPosition, timings: dict[str, Any]
    ) -> dict[str, str]:
        """Write the file or folder; returns the fields to add to the record: `sha256` for a file, none for a folder."""
        path, form = self.run_dir / record["path"], self.config["output"]["format"]
        if form in frames.STEMS:
            stem, _ = frames.STEMS[form]
            own = ({stem: number, f"{stem}_sha256": hash_pixels(one)} for number, one in enumerate(pixels))
            texts = [self._text(record, place, timings, extra) for extra in own]
            with translate_file_errors(path):
                frames.write_frames(path, pixels, texts, form)
            return {}
        data = ENCODERS[form](pixels, record, self._text(record, place, timings, {}))
        with translate_file_errors(path):
            write_atomically(path, data)
        return {"sha256": hashlib.sha256(data).hexdigest()}

    def _text(
        self, record: dict[str, Any], place: BatchPosition, timings: dict[str, Any], extra: dict[str, Any]
    ) -> dict[str, str]:
        """Build the two texts inside a file, by keyword; `extra`: recipe fields of a single frame or layer."""
        if not self.metadata:
            return {}
        recipe = {**self._recipe(record, place, timings), **extra}
        return {
            "parameters": format_parameters(self.config, self.facts, record),
            png.CHUNK: json.dumps(recipe, ensure_ascii=False),
        }

    def _recipe(self, record: dict[str, Any], place: BatchPosition, timings: dict[str, Any]) -> dict[str, Any]:
        sampling = self.config["sampling"]
        return {
            "format": FORMAT,
            "config": derive_picture_config(
                self.config, {key: record[key] for key in ("prompt", "negative_prompt", "seed")}
            ),
            # Drawing a picture alone or in its batch differs by rounding (other matrix shapes), so
            # replay redraws the batch.
            "batch": {"index": place.position, "sampling": {key: sampling.get(key) for key in WHICH}},
            "config_hash": place.config_hash,
            "pixels_sha256": record["pixels_sha256"],
            **{key: record[key] for key in ("caption", "cuts") if key in record},
            "created": self.created,
            "timings": timings,
            **self.facts,
        }


class BatchPosition(NamedTuple):
    """The position of a picture in its batch, and the configuration hash in its file name."""

    position: int
    config_hash: str


def derive_picture_config(config: dict[str, Any], texts: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration that draws one picture of a run; `texts`: its prompt, negative prompt and seed."""
    return {**config, "sampling": {**config["sampling"], **texts, "num_images_per_prompt": 1}}


def format_file_name(index: int, prompt: str, seed: int, digest: str, output_format: str) -> str:
    """Return the name of the file or folder of an output; `digest`: the configuration hash."""
    kind = kinds.find_format_kind(output_format)
    return f"{index:04d}-{slugify_prompt(prompt, kind.nameless)}-{seed}-{digest}{kind.formats[output_format]}"


def write_run(run_dir: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Write run.json and return its content: `format` and `record`. Raises WriteError."""
    record = {"format": FORMAT, **record}
    text = json.dumps(record, indent=2, ensure_ascii=False)
    # a refused configuration may hold halves of surrogate pairs, which become escapes
    file, data = run_dir / RECORD_FILE, text.encode(errors="backslashreplace") + b"\n"
    with translate_file_errors(file):
        try:
            write_atomically(file, data)
        except OSError:
            if not release_reserve(run_dir):
                raise
            write_atomically(file, data)
    return record


def describe_end(error: BaseException) -> dict[str, Any]:
    """Return the `status` and the `error` of run.json for the error that ended a run."""
    if isinstance(error, KeyboardInterrupt):
        message = f"interrupted by {error}" if str(error) else "interrupted by Ctrl-C"
        return {"status": "interrupted", "error": {"type": KeyboardInterrupt.__name__, "message": message}}
    return {"status": "failed", "error": describe_error(error)}


def describe_error(error: BaseException) -> dict[str, str]:
    """Return the `error` field of run.json."""
    return {"type": type(error).__name__, "message": redact_text(str(error))}


def current_timestamp() -> str:
    """Return the current UTC time in ISO 8601, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def format_parameters(config: dict[str, Any], facts: dict[str, Any], record: dict[str, Any]) -> str:
    """Format the AUTOMATIC1111 text: the prompt, the negative prompt, then one line of `Key: value` pairs."""
    sampling, model = config["sampling"], config["model"]
    guidance = sampling["guidance_scale"] if sampling["true_cfg_scale"] is None else sampling["true_cfg_scale"]
    lines = [record.get("caption", record["prompt"])]
    if (record["negative_prompt"] or "").strip():
        lines.append(f"Negative prompt: {record['negative_prompt']}")
    settings = {
        "Steps": sampling["num_inference_steps"],
        "Sampler": facts["scheduler"],
        "CFG scale": guidance,
        "Seed": record["seed"],
        "Size": f"{record['width']}x{record['height']}" if "width" in record else None,
        "Frames": record.get("frames"),
        "FPS": record.get("fps"),
        "Seconds": record.get("duration_s"),
        "Sample rate": record.get("sample_rate"),
        "Layers": record.get("layers"),
        "Model": model["name"],
        "Version": f"hydrarun {facts['versions']['hydrarun']}",
    }
    lines.append(", ".join(f"{key}: {value}" for key, value in settings.items() if value is not None))
    return "\n".join(lines)


def slugify_prompt(prompt: str, nameless: str) -> str:
    """Convert the prompt for a file name: a-z, 0-9 and `-`, at most 40 characters, whole words where they fit.

    Accents are dropped; a prompt without any Latin letter or digit becomes `nameless`.
    """
    plain = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode().lower()
    words = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")
    if len(words) > SLUG_LENGTH:
        whole = words[: SLUG_LENGTH + 1].rpartition("-")[0]
        words = whole or words[:SLUG_LENGTH]
    return words or nameless


def hash_pixels(pixels: np.ndarray) -> str:
    """Return the sha256 of the RGB or RGBA bytes, row by row from the top, frame after frame.

    For a sound, of its 16-bit samples, with the channels interleaved.
    """
    return hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()


def _refuse_constant(pixels: np.ndarray, prompt: str, seed: int, facts: Mapping[str, Any]) -> None:
    kind = kinds.find_array_kind(pixels)
    nothing = kind.monotone(pixels)
    if nothing is None:
        return
    wider = {"float16": "dtype=bfloat16 or dtype=float32", "bfloat16": "dtype=float32"}.get(facts["dtype"])
    causes = [
        *([f"overflow of {facts['dtype']} (try {wider})"] if wider else []),
        *(["a fault in the attention backend (try attention=sdpa)"] if facts["attention"] != "sdpa" else []),
        "weights that do not belong to this model (see model.path)",
    ]
    raise RunError(
        f"the {kind.one} for seed {seed} ({prompt[:60]!r}) is all {nothing}; nothing was written for it."
        f" Likely cause{'' if len(causes) == 1 else 's'}: {', or '.join(causes)}."
    )


def to_recorded_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration as output files and run.json store it: absolute paths, home folder `~`, no secrets.

    Leaves out the limit on the number of ranks, which a file may not set.
    """
    recorded = redact_config(_make_paths_absolute(config))
    recorded.get("parallel", {}).pop("max_ranks", None)
    return recorded


def _make_paths_absolute(config: dict[str, Any]) -> dict[str, Any]:
    """Make paths absolute, so that the record is valid from any folder; hub ids are kept."""
    model, given = config["model"], config["input"]
    if os.path.isdir(expand_home(model["path"])):
        model = {**model, "path": _make_absolute(model["path"])}
    if given["images"] is not None:
        given = {**given, "images": [_make_absolute(path) for path in image_paths(config)]}
    return {**config, "model": model, "input": given}


def _make_absolute(path: str) -> str:
    return str(resolve_path(path))


@dataclass
class Picture:
    """An output, and the inputs that reproduce it."""

    pixels: np.ndarray  # an array of `hydrarun.outputs.media.kinds`
    prompt: str
    negative_prompt: str | None
    seed: int
    caption: str | None = None  # the text that the model used for a blank prompt
    cuts: list[dict[str, Any]] = field(default_factory=list)  # what the text encoders did not read of the texts
