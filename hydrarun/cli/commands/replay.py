"""`hydrarun replay FILE`: draws the content of a file again from its embedded recipe and compares the two.

The recipe is untrusted. It passes the same checks as a configuration from the command line. It never goes through
OmegaConf, so no interpolation in it is resolved.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override

from hydrarun.cli.arguments import Arguments
from hydrarun.config import batches, schema
from hydrarun.config.checks.configuration import check_configuration
from hydrarun.config.compose import compose_config
from hydrarun.config.schema import Report
from hydrarun.core.errors import UsageError, suggest_name
from hydrarun.core.files import resolve_path
from hydrarun.core.inputs import image_paths
from hydrarun.core.nested import iterate_leaves
from hydrarun.core.printable import make_printable
from hydrarun.core.progress import Progress
from hydrarun.core.quoting import quote_overrides
from hydrarun.engine.ranks import launch
from hydrarun.outputs.media import frames, kinds
from hydrarun.outputs.media.read import read_output
from hydrarun.outputs.provenance import expand_home
from hydrarun.outputs.reader import FACTS, RecordedPicture, RecordedRun, is_lossy, load_recorded_run
from hydrarun.outputs.run_folder import claim_run_folder
from hydrarun.outputs.writer import WHICH, hash_pixels

USAGE = """\
usage: hydrarun replay FILE [hydra.run.dir=DIR] [KEY=VALUE ...]

Draws FILE again from the recipe inside it and compares the pixels or samples. FILE is a picture (PNG), a sound (WAV), a
video (MP4, a folder of frames, or one frame-00000.png of it), a folder of layers or one layer-0.png of it, or the
run.json of a whole run.
KEY=VALUE changes how it is drawn: device=cuda, dtype=bfloat16, attention=sdpa, model.path=/elsewhere
input.images=[/elsewhere/a.png] sets the paths of the input images on this machine.
Exit code: 0 identical, 1 different, 2 FILE cannot be replayed."""

RUN_DIR = "hydra.run.dir="

MAX_LINE = 300  # most characters of a line about what a file records

# the groups that set how to draw; `model` and `sampling` set what to draw, which comes from the file
GROUPS = ("scheduler", "parallel", "cache", "attention", "compile", "quantization", "offload")


# keys whose value is a whole list
LISTS = ("input.images", "report.metrics", "report.noise_floor")


def replay_file(line: Arguments) -> int:
    """Replay a file; return the exit code. Raises UsageError, and RunError from the run itself."""
    file, output_dir, overrides = split_words(line.words)
    recorded = load_recorded_run(file)
    config = rebuild_config(recorded, overrides)
    progress = Progress()
    for text in describe_config(config):
        progress.note(text[:MAX_LINE])
    check_frames(recorded, config["output"]["format"])
    check_picture_indices(recorded, batches.count_items(config))
    with claim_run_folder(output_dir, batches.is_batch_run(config)):
        record = launch.run_configuration(config, output_dir)
    same = [compare_picture(picture, record, output_dir) for picture in recorded.pictures]
    for text in list_differences(recorded.facts, record):
        print(make_printable(text, MAX_LINE))
    return 0 if all(same) else 1


def split_words(words: Sequence[str]) -> tuple[Path, Path, list[str]]:
    """Return the file, the output folder and the other overrides. Raises UsageError."""
    files = [word for word in words if "=" not in word or os.path.exists(word)]
    overrides = [word for word in words if word not in files]
    if len(files) != 1:
        raise UsageError(f"replay takes one file, not {' '.join(files) or 'none'}", *USAGE.splitlines())
    file = Path(files[0])
    output_dir = Path(f"outputs/{datetime.now():%Y-%m-%d/%H-%M-%S-%f}-replay")
    for override in [override for override in overrides if override.startswith(RUN_DIR)]:
        output_dir = Path(override.removeprefix(RUN_DIR))
        overrides.remove(override)
    made_in = file.parent.parent if frames.NAME.fullmatch(file.name) else file.parent
    if resolve_path(output_dir) in (resolve_path(made_in), resolve_path(file.parent)):
        raise UsageError(f"hydra.run.dir={output_dir}: {file.name} itself is there and would be overwritten")
    return file, output_dir, overrides


def rebuild_config(recorded: RecordedRun, overrides: Sequence[str]) -> dict[str, Any]:
    """Apply `overrides` to the recorded configuration and check it like one from the command line.

    Raises UsageError that lists all mistakes.
    """
    try:
        config = schema.fill_defaults(copy.deepcopy(recorded.config))
        _pin_config(config, recorded.facts)
        config["report"] = asdict(Report())  # a replay compares with the file; an untrusted file must not name folders
        config["warmup"] = 0
        if isinstance(config.get("compile"), dict) and "cache_dir" in config["compile"]:
            config["compile"]["cache_dir"] = None
        _refuse_rank_limit(config)
        for override in sorted(overrides, key=lambda text: text.partition("=")[0] not in GROUPS):  # as Hydra does
            _apply_override(config, override)
        config = expand_home(config)
        check_configuration(config)
    except RecursionError:
        raise UsageError("the file's configuration is nested too deeply") from None
    return config


def _refuse_rank_limit(config: dict[str, Any]) -> None:
    """Raise UsageError if the file sets how many ranks may be started. No file that hydrarun wrote does."""
    parallel = config.get("parallel")
    if isinstance(parallel, dict) and parallel.get("max_ranks") is not None:
        raise UsageError("parallel.max_ranks: set in the file; only the command line may set it")


def _pin_config(config: dict[str, Any], facts: dict[str, Any]) -> None:
    """Replace open settings by the recorded ones: the hub commit, and an `auto` device and dtype."""
    weights, model = facts["weights"], config.get("model")
    if isinstance(weights, dict) and weights.get("revision") and isinstance(model, dict):
        model["revision"] = weights["revision"]
    for key in ("device", "dtype"):
        if config.get(key) == "auto" and facts[key]:
            config[key] = facts[key]


def _apply_override(config: dict[str, Any], text: str) -> None:
    override = _parse_override(text)
    *path, name = override.key_or_group.split(".")
    key = ".".join((*path, name))
    if path == ["sampling"] and name in WHICH:
        raise UsageError(f"{key}: a replay draws what the file says; for another picture: hydrarun {text}")
    if key in GROUPS:
        config[key] = compose_config([text])[key]
        return
    section: Any = config
    for part in path:
        section = section.get(part) if isinstance(section, dict) else None
    if not isinstance(section, dict) or (name not in section and ".".join(path) not in schema.OPEN):
        known = map(str, section) if isinstance(section, dict) else ()
        raise UsageError(f"{key}: the file's configuration has no such key.{suggest_name(name, known)}")
    if isinstance(section.get(name), (dict, list)) and key not in LISTS:
        raise UsageError(f"{key}: a replay changes single values, not whole sections")
    section[name] = override.value()
    if key == "model.path":
        section["revision"] = None  # the recorded one belongs to the recorded checkpoint


def _parse_override(text: str) -> Override:
    override = OverridesParser.create().parse_override(quote_overrides([text])[0])
    if override.is_sweep_override() or override.is_delete() or override.is_add():
        raise UsageError(f"{text}: a replay draws once and only changes values: KEY=VALUE")
    return override


def check_frames(recorded: RecordedRun, output_format: str) -> None:
    """Check that a single frame is replayed as frames, since no other format keeps its pixels. Raises UsageError."""
    for picture in recorded.pictures:
        if picture.part is not None and output_format not in frames.STEMS:
            raise UsageError(
                f"{picture.name}: one frame of a video; its pixels can only be compared with "
                f"output.format=frames, not {output_format}"
            )


def check_picture_indices(recorded: RecordedRun, count: int) -> None:
    """Check that each recorded picture is one of the `count` that its configuration draws. Raises UsageError."""
    for picture in recorded.pictures:
        if picture.index not in range(count):
            raise UsageError(f"{picture.name}: recorded as number {picture.index} (from 0) of a run that draws {count}")


def describe_config(config: dict[str, Any]) -> Iterator[str]:
    """Describe what an untrusted file makes this machine do, and which images it reads."""
    model, sampling, output = config["model"], config["sampling"], config["output"]
    revision = f" at {model['revision']}" if model["revision"] else ""
    kind = kinds.find_model_kind(config["model"])
    what = [kind.size(sampling)]
    if length := kind.length(sampling):
        what.append(length if output["fps"] is None else f"{length} at {output['fps']} fps")
    what.append(f"{sampling['num_inference_steps']} steps")
    yield f"replaying {model['name']} from {model['path']}{revision}: {', '.join(what)}"
    yield from (f"  input image {path}" for path in image_paths(config))


def compare_picture(picture: RecordedPicture, record: dict[str, Any], folder: Path) -> bool:
    """Compare with the redrawn picture in `record` and `folder`; print the result, return whether it is identical."""
    name = make_printable(picture.name)
    output = next(output for output in record["outputs"] if output["index"] == picture.index)
    file, digest = folder / output["path"], output["pixels_sha256"]
    of_them = "samples" if "samples" in output else "pixels"
    if picture.part is not None:
        file /= picture.part
        digest = hash_pixels(read_output(file)[0])
    if digest == picture.pixels_sha256:
        print(f"{name}: identical {of_them}")
        return True
    lossy = " (as decoded from mp4, which is lossy)" if picture.lossy or is_lossy(file) else ""
    print(f"{name}: different {of_them}, {_format_distance(picture.pixels, read_output(file)[0])}{lossy}")
    return False


def _format_distance(old: np.ndarray | None, new: np.ndarray) -> str:
    if old is None:
        return "according to their hash; the recorded pixels are no longer available to measure the distance"
    if old.shape != new.shape:
        return f"{_format_size(old)} then, {_format_size(new)} now"
    # frame by frame, because int32 and int64 copies of a whole video need too much memory
    pairs = zip(old.reshape(-1, *old.shape[-3:]), new.reshape(-1, *new.shape[-3:]), strict=True)
    apart = (a.astype(np.int32) - b for a, b in pairs)
    measured = [(int(np.abs(d).max()), float(np.square(d, dtype=np.int64).mean())) for d in apart]
    largest, error = max(most for most, _ in measured), sum(mean for _, mean in measured) / len(measured)
    if largest == 0:  # lossy files can decode to equal pixels although the originals differ
        return "too little to be measured"
    levels = kinds.find_array_kind(old).levels
    return f"largest difference {largest} of {levels}, PSNR {10 * math.log10(levels**2 / error):.1f} dB"


def _format_size(pixels: np.ndarray) -> str:
    kind = kinds.find_array_kind(pixels)
    if kind is kinds.SOUND:
        return f"{len(pixels)} samples"
    count = f"{len(pixels)} {kind.parts} of " if kind.parts else ""
    return f"{count}{pixels.shape[-2]}x{pixels.shape[-3]}"


def list_differences(then: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """Yield a line for each fact (versions, hardware, weights, device…) that differs between the two runs."""
    old = dict(iterate_leaves({key: then.get(key) for key in FACTS}))
    new = dict(iterate_leaves({key: now.get(key) for key in FACTS}))
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            yield f"  {key}: {old.get(key)} then, {new.get(key)} now"
