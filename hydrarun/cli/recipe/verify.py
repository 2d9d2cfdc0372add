"""`hydrarun recipe verify`: run a recipe, compare with its evidence, and write down what was found."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from hydrarun.cli.recipe.preview import described, quoted
from hydrarun.config import hub
from hydrarun.config.checks.report import METRICS
from hydrarun.config.compose import compose
from hydrarun.config.recipes import file
from hydrarun.config.recipes import search as source
from hydrarun.config.recipes.file import Recipe
from hydrarun.config.recipes.metadata import FORMAT, Evidence, Measured, Verified
from hydrarun.core.errors import RunError, UsageError, nearest
from hydrarun.core.files import write_atomically
from hydrarun.core.quoting import printable
from hydrarun.engine.ranks import launch
from hydrarun.outputs.provenance import hardware, redact_text, versions

RUN_DIR = "hydra.run.dir"

#: what may be said differently: where, and what is measured beside it; all else is the recipe's to say
ALLOWED = (
    "model.path",
    "device",
    "verify",
    "compile.cache_dir",
    "report.metrics",
    "report.noise_floor",
    "report.twins",
    RUN_DIR,
)


def verify(name: str, overrides: Sequence[str]) -> int:
    """Run the recipe of that name or path; the exit code: 0 if it is now verified, else 1.

    Raises UsageError for a recipe that cannot be run as it is, RunError where its weights are not here or are others.
    """
    recipe, folder = source.recipe(name), run_dir(overrides)
    file.with_evidence(recipe, Evidence(FORMAT, "unverified", ""))  # one that cannot take any is refused now
    old = recipe.evidence.measured if recipe.evidence and recipe.genuine else None
    config = compose([quoted(name), *chosen(overrides, old)])
    for line in described(recipe, name, config, str(folder)):
        print(line, file=sys.stderr)
    check_weights(config, old)
    evidence, thumbnail = judged(recipe, config, old, folder)
    keep(recipe, evidence, thumbnail)
    return 0 if evidence.status == "verified" else 1


def run_dir(overrides: Sequence[str]) -> Path:
    """Where to draw."""
    given = [override.partition("=")[2] for override in overrides if override.startswith(f"{RUN_DIR}=")]
    return Path(given[-1] if given else f"outputs/{datetime.now():%Y-%m-%d/%H-%M-%S-%f}-verify")


def chosen(overrides: Sequence[str], old: Measured | None) -> list[str]:
    """The overrides for the composition; what the evidence has of quality is measured again.

    Raises UsageError for one that would make another recipe of it.
    """
    for override in overrides:
        key = override.partition("=")[0]
        if key not in ALLOWED:
            raise UsageError(
                f"{override}: a recipe is verified as it is.{nearest(key, ALLOWED)} You may say: {', '.join(ALLOWED)}."
            )
    kept = [override for override in overrides if not override.startswith(f"{RUN_DIR}=")]
    if old and old.quality and not any(override.startswith("report.") for override in kept):
        floor = old.quality.get("noise_floor")
        kept.append(f"report.metrics=[{','.join(name for name in METRICS if name in old.quality)}]")
        names = [name for name in floor if isinstance(name, str)] if isinstance(floor, dict) else []
        kept.append(f"report.noise_floor=[{','.join(names)}]")
    return kept


def check_weights(config: dict[str, Any], old: Measured | None) -> None:
    """Find the weights, downloading what is missing. Raises RunError if they are not those of the evidence.

    Raises UsageError, before anything is downloaded, where the device is not there.
    """
    from hydrarun.core.device import choose_device
    from hydrarun.core.progress import Progress
    from hydrarun.models.weights.safetensors import fingerprint

    choose_device(config["device"], Progress(quiet=True))
    found = fingerprint(hub.resolve(config["model"]).folder)
    if old and found != old.weights.fingerprint:
        raise RunError(
            f"model.path={config['model']['path']}: the evidence is of other weights: their fingerprint is"
            f" {printable(old.weights.fingerprint)}, that of these {found}. Name the right ones by model.path=…, or"
            " take the section `evidence` out of the recipe to begin anew"
        )


def judged(recipe: Recipe, config: dict[str, Any], old: Measured | None, folder: Path) -> tuple[Evidence, bytes | None]:
    """Run it, twice where there is no evidence yet, and compare; with a new thumbnail, if it needs one."""
    from hydrarun.cli.recipe import evidence  # numpy and Pillow only now
    from hydrarun.cli.recipe import pixel_digest as pixels

    thumbnail = None
    try:
        if old is None:
            first = folder / "first"
            record = launch.run(config, first)
            if sample := sample_name(recipe):
                thumbnail = pixels.sample(evidence.drawn(record, first))
            old, folder = evidence.measured(record, first, sample), folder / "second"
        new = evidence.measured(launch.run(config, folder), folder, None)
    except RunError as error:
        found = [redact_text(str(error))]
        return Evidence(FORMAT, "broken", "", old, Verified(now(), this_hardware(), versions(), [], found)), thumbnail
    status, outputs, found = evidence.compare(old, new)
    return Evidence(FORMAT, status, "", old, Verified(now(), new.hardware, new.versions, outputs, found)), thumbnail


def now() -> str:
    """ISO 8601, UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def this_hardware() -> dict[str, Any]:
    """What a run that failed was tried on."""
    import torch

    return hardware("cuda" if torch.cuda.is_available() else "cpu")


def sample_name(recipe: Recipe) -> str | None:
    """The name for a thumbnail beside the recipe; None where a file that is none of ours has it."""
    place = recipe.path.with_suffix(".webp")
    measured = recipe.evidence.measured if recipe.evidence else None
    return place.name if not place.exists() or (measured and measured.sample == place.name) else None


def keep(recipe: Recipe, evidence: Evidence, thumbnail: bytes | None) -> None:
    """Say what was found and write it into the recipe, or print it where that cannot be written."""
    assert evidence.verified is not None
    for verdict in evidence.verified.outputs:
        psnr = "" if verdict.psnr is None else f", {verdict.psnr} dB between block means"
        print(f"output {verdict.index}: {verdict.result}{psnr}")
    for sentence in evidence.verified.found:
        print(printable(sentence, 2000))
    if recipe.path.read_bytes() != recipe.text.encode():
        raise RunError(f"{recipe.path}: was changed while it ran, so nothing is written into it")
    try:
        if thumbnail:
            write_atomically(recipe.path.with_suffix(".webp"), thumbnail)
        file.write(recipe, evidence)
        print(f"{recipe.path}: {evidence.status}")
    except OSError as error:
        print(f"{recipe.path}: {evidence.status}, but it cannot be written here ({error.strerror}). The evidence:")
        print(file.section_text(file.signed(recipe, evidence)), end="")
