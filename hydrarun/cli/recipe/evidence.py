"""Builds the evidence of a recipe from a finished run, and compares a later run with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from hydrarun.cli.recipe import pixel_digest
from hydrarun.config.recipes.metadata import Measurement, OutputVerdict, Status, parse_dataclass
from hydrarun.config.recipes.yaml_loader import RecipeError
from hydrarun.core.errors import RunError
from hydrarun.outputs.media.read import read_output
from hydrarun.outputs.reader import is_lossy
from hydrarun.outputs.writer import hash_pixels

#: PSNR in dB between fingerprints from which an output is near. On the demo model, bfloat16 instead of float32 gives
#: 64 dB, another seed 15 dB
NEAR = 30.0
#: ratio of times above which a run on the same hardware is slow
SLOW = 1.5
#: how much lower the mean of a quality measure of a later run may be
LOSS = {"psnr": 0.5, "ssim": 0.005, "snr": 0.5}
#: the recorded keys for the size of an output
EXTENT = ("width", "height", "frames", "samples")
#: facts that must be equal to expect bit-identical outputs
EXACT = ("hardware", "versions", "device", "dtype")


class Comparison(NamedTuple):
    """The status, the verdict of each output, and sentences about everything else."""

    status: Status
    outputs: list[OutputVerdict]
    found: list[str]


def measure_run(record: Mapping[str, Any], folder: Path, sample: str | None) -> Measurement:
    """Build the evidence of a run from its run.json and output files. `sample` is the name of the thumbnail.

    Raises RunError if something is missing or was changed after the run.
    """
    try:
        return parse_dataclass(Measurement, {**_read_facts(record, folder), "sample": sample}, "run.json")
    except (LookupError, TypeError, AttributeError) as error:
        raise RunError(f"{folder}: its run.json is incomplete ({type(error).__name__}: {error})") from None
    except RecipeError as refused:
        raise RunError(f"{folder}: {refused}") from None


def _read_facts(record: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    timings, steps = record["timings"], record["timings"]["steps_s"]
    quality = {key: value for key, value in record.get("quality", {}).items() if key != "twin"}
    weights = record["weights"]
    return {
        "date": record["created"],
        "config_hash": record["config_hash"],
        "weights": {**weights, "path": None if is_local_path(weights["path"]) else weights["path"]},
        **{key: record[key] for key in EXACT},
        "timings": {
            "load_s": round(timings["load_s"], 4),
            "first_step_s": round(steps[0], 4),
            "step_s": round(fmean(steps[1:] or steps), 4),
            "total_s": round(timings["total_s"], 4),
        },
        "memory": record["memory"],
        "inputs": [image["sha256"] for image in record["inputs"]],
        "outputs": [_measure_output(output, folder) for output in record["outputs"]],
        "quality": quality or None,
    }


def is_local_path(path: str) -> bool:
    """Return whether a recorded path is a local one, which has no meaning on other machines."""
    return path.startswith(("/", "~"))


def read_first_output(record: Mapping[str, Any], folder: Path) -> np.ndarray:
    """Return the pixels of a run's first output, decoded from its file."""
    return read_output(folder / Path(record["outputs"][0]["path"]).name)[0]


def _measure_output(output: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    kept = ("index", "prompt", "seed", "pixels_sha256", *EXTENT)
    path = folder / Path(output["path"]).name
    found = read_output(path)[0]
    if not is_lossy(path) and hash_pixels(found) != output["pixels_sha256"]:
        raise RunError(f"{path}: its pixels differ from those that the run drew")
    return {
        **{key: output[key] for key in kept if key in output},
        "fingerprint": pixel_digest.compute_fingerprint(found),
    }


def compare_evidence(old: Measurement, new: Measurement) -> Comparison:
    """Compare a new run of the recipe with its evidence.

    `broken`: the pixels are different or worse. `unverified`: much slower on the same hardware. Otherwise `verified`.
    """
    exact = all(getattr(old, key) == getattr(new, key) for key in EXACT)
    verdicts = [judge_output(one, other) for one, other in zip(old.outputs, new.outputs, strict=False)]
    broken = list(_explain_mismatch(old, new, verdicts, exact))
    said, slow = compare_timings(old, new)
    status: Status = "broken" if broken else "unverified" if slow else "verified"
    return Comparison(status, verdicts, [*broken, said, *format_quality(new)])


def judge_output(old: Any, new: Any) -> OutputVerdict:
    """Compare one output by its hash, or else by its fingerprint and size."""
    if old.pixels_sha256 == new.pixels_sha256:
        return OutputVerdict(old.index, "identical")
    distance = round(pixel_digest.compare_fingerprints(old.fingerprint, new.fingerprint), 1)
    same_shape = all(getattr(old, name) == getattr(new, name) for name in EXTENT)
    return OutputVerdict(old.index, "near" if same_shape and distance >= NEAR else "different", distance)


def _explain_mismatch(old: Measurement, new: Measurement, verdicts: list[OutputVerdict], exact: bool) -> Iterator[str]:
    if len(old.outputs) != len(new.outputs):
        yield f"draws {len(new.outputs)} outputs, the evidence has {len(old.outputs)}"
    if old.inputs != new.inputs:
        yield "the input images are not those of the evidence"
    if count := sum(one.result == "different" for one in verdicts):
        yield f"{count} of {len(verdicts)} outputs are different"
    if exact and any(one.result == "near" for one in verdicts):
        yield "not identical, though hardware and versions are the evidence's"
    yield from list_quality_losses(old.quality or {}, new.quality or {})


def compare_timings(old: Measurement, new: Measurement) -> tuple[str, bool]:
    """Return a sentence about the times, and whether they are much longer on the same hardware."""
    now = f"{new.timings.step_s:.3g} s a step, {new.timings.total_s:.3g} s in all"
    if old.hardware != new.hardware:
        return f"times are not compared, the evidence is from other hardware: {now}", False
    slow = new.timings.step_s > SLOW * old.timings.step_s or new.timings.total_s > SLOW * old.timings.total_s
    then = f"{old.timings.step_s:.3g} and {old.timings.total_s:.3g} s"
    why = f"more than {SLOW} times as long as" if slow else f"within {SLOW} times"
    return f"{now}: {why} the evidence's {then}", slow


def list_quality_losses(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """Yield a sentence for each quality measure that is lower than in the evidence by more than its tolerance.

    A mean above that of the noise floor is good enough: uncached runs do not match each other better.
    """
    floors = list((new.get("noise_floor") or {}).values())
    for name, loss in LOSS.items():
        before, now = read_number(old, name, "mean"), read_number(new, name, "mean")
        floor = min((read_number(floor, name, "mean") or 0.0 for floor in floors), default=float("inf"))
        if before is not None and now is not None and now < min(before - loss, floor):
            yield f"{name} {now:.4g} on average, {before:.4g} in the evidence"
    before, now = (read_number(one, "accuracy", "outputs") for one in (old, new))
    if before is not None and now is not None and now < before:
        yield f"the judge finds {now:.0%} of the pictures right, {before:.0%} in the evidence"


def format_quality(new: Measurement) -> Iterator[str]:
    """Format the quality measures as one sentence; nothing if there are none."""
    means = [(name, read_number(new.quality or {}, name, "mean")) for name in LOSS]
    words = [f"{name} {mean:.4g}" for name, mean in means if mean is not None]
    if (share := read_number(new.quality or {}, "accuracy", "outputs")) is not None:
        words.append(f"accuracy {share:.0%}")
    if words:
        yield f"quality: {', '.join(words)}"


def read_number(block: Mapping[str, Any], *path: str) -> float | None:
    """Return the number under `path` in untrusted evidence, or None."""
    value: Any = block
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
