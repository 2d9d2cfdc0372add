"""Finds the cheapest settings that fit: compatible combinations of offload, quantization and VAE tiling."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hydrarun.config.checks import compatibility
from hydrarun.config.checks.checkpoint import check_offloaded_blocks
from hydrarun.core.errors import UsageError
from hydrarun.core.resources import read_options
from hydrarun.engine.plan.devices import DeviceSpec
from hydrarun.engine.plan.estimate import DryForwardResult
from hydrarun.engine.plan.memory_model import Estimate, WeightSettings
from hydrarun.models.experts import HIGH_NOISE

#: options of offload, cheapest first; and options of quantization that mainly save memory
OFFLOADS = ("none", "modulation", "text_encoder", "expert", "model", "layerwise", "disk")
QUANTIZATIONS = ("none", "fp8_weight_only", "int8_weight_only")
COUNT = 3
#: times within this share of each other count as equal; then lossless, then fewer changes come first
SAME = 0.02


@dataclass(frozen=True)
class Suggestion:
    """A setting that fits, and the changes that it needs."""

    overrides: tuple[str, ...]
    #: config sections that it replaces
    changes: dict[str, dict[str, Any]]
    #: whether the pictures stay the same
    lossless: bool
    peak: int
    seconds: float | None


def find_suggestions(
    config: dict[str, Any], dry_run: DryForwardResult, device: DeviceSpec, tiled: DryForwardResult | None = None
) -> list[Suggestion]:
    """Return at most three, the cheapest first. `tiled`: a dry forward with VAE tiling, to be considered too."""
    fitting = list(list_candidates(config, config["vae"]["tiling"], dry_run, device))
    if tiled:
        fitting += list_candidates(config, True, tiled, device)
    least = min((one.seconds or 0 for one in fitting), default=0)
    return sorted(fitting, key=lambda one: make_sort_key(one, least))[:COUNT]


def list_candidates(
    config: dict[str, Any], tiling: bool, dry_run: DryForwardResult, device: DeviceSpec
) -> Iterator[Suggestion]:
    """Yield every compatible setting that fits."""
    offloads, quantizations = (
        list_options(config, "offload", OFFLOADS),
        list_options(config, "quantization", QUANTIZATIONS),
    )
    vae = {**config["vae"], "tiling": tiling}
    for offload, quantization in itertools.product(offloads, quantizations):
        changes = {"offload": offloads[offload], "quantization": quantizations[quantization], "vae": vae}
        changed = {**config, **changes}
        if any(compatibility.find_violations(changed)) or not has_enough_blocks(changes["offload"], dry_run):
            continue
        found = Estimate(dry_run, WeightSettings.from_config(changed), device)
        if found.fits:
            words = {"offload": offload, "quantization": quantization}
            overrides = [f"{name}={word}" for name, word in words.items() if changes[name] != config[name]]
            overrides += [f"vae.tiling={str(tiling).lower()}"] if vae != config["vae"] else []
            lossless = quantization == "none" and not tiling
            yield Suggestion(tuple(overrides), changes, lossless, found.peak, found.seconds)


def has_enough_blocks(offload: dict[str, Any], dry_run: DryForwardResult) -> bool:
    """Return whether the model has enough blocks for an offload that prefetches blocks."""
    depth = next(len(one.blocks) for one in dry_run.components if one.name == HIGH_NOISE)
    try:
        check_offloaded_blocks(offload, depth, "cuda")
    except UsageError:
        return False
    return True


def list_options(config: dict[str, Any], group: str, names: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Return the options in `names`, and the configured one if it is none of them."""
    shipped = read_options(group)
    found = {name: shipped[name] for name in names}
    return found if config[group] in found.values() else found | {"as asked": config[group]}


def make_sort_key(one: Suggestion, least: float) -> tuple[Any, ...]:
    """Return the sort key: time in steps of `SAME`, lossless first, fewest changes, cheapest offload."""
    steps = 0 if not least else round(((one.seconds or 0) / least - 1) / SAME)
    chosen = [override.removeprefix("offload=") for override in one.overrides]
    place = sum(OFFLOADS.index(name) for name in chosen if name in OFFLOADS)
    return steps, not one.lossless, len(one.overrides), place
