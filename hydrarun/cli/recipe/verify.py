"""`hydrarun recipe verify`: runs a recipe, compares it with its evidence, and writes the result into the file."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from hydrarun.cli.recipe.preview import describe_recipe, quote_recipe
from hydrarun.config import hub
from hydrarun.config.checks.report import METRICS
from hydrarun.config.compose import compose_config
from hydrarun.config.recipes import file, search
from hydrarun.config.recipes.file import Recipe
from hydrarun.config.recipes.metadata import FORMAT, Evidence, Measurement, Verification
from hydrarun.config.recipes.yaml_loader import MAX_BYTES
from hydrarun.core.errors import RunError, UsageError, suggest_name
from hydrarun.core.files import read_file, write_atomically
from hydrarun.core.printable import make_printable
from hydrarun.engine.ranks import launch
from hydrarun.outputs.provenance import collect_versions, describe_hardware, redact_text

RUN_DIR = "hydra.run.dir"

#: keys that may be overridden: where the recipe runs, and what is measured; all other settings come from the recipe
ALLOWED = (
    "model.path",
    "device",
    "parallel.max_ranks",
    "verify",
    "compile.cache_dir",
    "report.metrics",
    "report.noise_floor",
    "report.twins",
    RUN_DIR,
)


def verify_evidence(name: str, overrides: Sequence[str]) -> int:
    """Run the recipe with this name or path; return the exit code: 0 if it is now verified, else 1.

    Raises UsageError for a recipe that cannot be run as it is, and RunError for missing or different weights.
    """
    recipe, folder = search.load_recipe(name), choose_run_dir(overrides)
    file.replace_evidence(recipe, Evidence(FORMAT, "unverified", ""))  # refuses a file without room for it
    old = recipe.evidence.measured if recipe.evidence and recipe.genuine else None
    config = compose_config([quote_recipe(name), *choose_overrides(overrides, old)])
    launch.check_rank_count(config)
    for line in describe_recipe(recipe, name, config, str(folder)):
        print(line, file=sys.stderr)
    check_weights(config, old)
    evidence, thumbnail = judge_recipe(recipe, config, old, folder)
    save_evidence(recipe, evidence, thumbnail)
    return 0 if evidence.status == "verified" else 1


def choose_run_dir(overrides: Sequence[str]) -> Path:
    """Return the output folder."""
    given = [override.partition("=")[2] for override in overrides if override.startswith(f"{RUN_DIR}=")]
    return Path(given[-1] if given else f"outputs/{datetime.now():%Y-%m-%d/%H-%M-%S-%f}-verify")


def choose_overrides(overrides: Sequence[str], old: Measurement | None) -> list[str]:
    """Return the overrides for the composition, with those that measure the quality metrics of the evidence again.

    Raises UsageError for an override that would change the recipe.
    """
    for override in overrides:
        key = override.partition("=")[0]
        if key not in ALLOWED:
            raise UsageError(
                f"{override}: a recipe is verified as it is.{suggest_name(key, ALLOWED)}"
                f" You may set: {', '.join(ALLOWED)}."
            )
    kept = [override for override in overrides if not override.startswith(f"{RUN_DIR}=")]
    if old and old.quality and not any(override.startswith("report.") for override in kept):
        floor = old.quality.get("noise_floor")
        kept.append(f"report.metrics=[{','.join(name for name in METRICS if name in old.quality)}]")
        names = [name for name in floor if isinstance(name, str)] if isinstance(floor, dict) else []
        kept.append(f"report.noise_floor=[{','.join(names)}]")
    return kept


def check_weights(config: dict[str, Any], old: Measurement | None) -> None:
    """Find the weights and download missing ones. Raises RunError if they are not the weights of the evidence.

    Raises UsageError before any download if the device is not available.
    """
    from hydrarun.core.device import choose_device
    from hydrarun.core.progress import Progress
    from hydrarun.models.weights.safetensors import fingerprint_weights

    choose_device(config["device"], Progress(quiet=True))
    found = fingerprint_weights(hub.resolve_weights(config["model"]).folder)
    if old and found != old.weights.fingerprint:
        raise RunError(
            f"model.path={config['model']['path']}: the evidence was measured with other weights: fingerprint"
            f" {make_printable(old.weights.fingerprint)} there, {found} here. Set model.path=… to the right weights,"
            " or remove the section `evidence` from the recipe to start over"
        )


def judge_recipe(
    recipe: Recipe, config: dict[str, Any], old: Measurement | None, folder: Path
) -> tuple[Evidence, bytes | None]:
    """Run the recipe, twice if it has no evidence, and compare. Return the evidence, and a thumbnail if it is new."""
    from hydrarun.cli.recipe import (
        evidence,  # imports numpy and Pillow
        pixel_digest,
    )

    thumbnail = None
    try:
        if old is None:
            first = folder / "first"
            record = launch.run_configuration(config, first)
            if sample := choose_thumbnail_name(recipe):
                thumbnail = pixel_digest.make_thumbnail(evidence.read_first_output(record, first))
            old, folder = evidence.measure_run(record, first, sample), folder / "second"
        new = evidence.measure_run(launch.run_configuration(config, folder), folder, None)
    except RunError as error:
        found = [redact_text(str(error))]
        return Evidence(
            FORMAT, "broken", "", old, Verification(format_now(), read_hardware(), collect_versions(), [], found)
        ), thumbnail
    status, outputs, found = evidence.compare_evidence(old, new)
    return Evidence(
        FORMAT, status, "", old, Verification(format_now(), new.hardware, new.versions, outputs, found)
    ), thumbnail


def format_now() -> str:
    """Return the current time in ISO 8601, UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def read_hardware() -> dict[str, Any]:
    """Return the hardware of a run that failed."""
    import torch

    return describe_hardware("cuda" if torch.cuda.is_available() else "cpu")


def choose_thumbnail_name(recipe: Recipe) -> str | None:
    """Return the name for a thumbnail next to the recipe; None if an unrelated file already has this name."""
    place = recipe.path.with_suffix(".webp")
    measured = recipe.evidence.measured if recipe.evidence else None
    return place.name if not place.exists() or (measured and measured.sample == place.name) else None


def save_evidence(recipe: Recipe, evidence: Evidence, thumbnail: bytes | None) -> None:
    """Print the results and write them into the recipe; print the evidence if the file cannot be written."""
    assert evidence.verified is not None
    for verdict in evidence.verified.outputs:
        psnr = "" if verdict.psnr is None else f", {verdict.psnr} dB between block means"
        print(f"output {verdict.index}: {verdict.result}{psnr}")
    for sentence in evidence.verified.found:
        print(make_printable(sentence, 2000))
    if not is_unchanged(recipe):
        raise RunError(f"{recipe.path}: was changed while it ran, so nothing is written into it")
    try:
        if thumbnail:
            write_atomically(recipe.path.with_suffix(".webp"), thumbnail)
        file.write_evidence(recipe, evidence)
        print(f"{recipe.path}: {evidence.status}")
    except OSError as error:
        print(f"{recipe.path}: {evidence.status}, but it cannot be written here ({error.strerror}). The evidence:")
        print(file.format_evidence(file.sign_evidence(recipe, evidence)), end="")


def is_unchanged(recipe: Recipe) -> bool:
    """Return whether the recipe's file still holds what was read from it."""
    try:
        return read_file(recipe.path, MAX_BYTES) == recipe.text.encode()
    except OSError:
        return False
