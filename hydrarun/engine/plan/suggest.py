"""The cheapest settings that fit: of offload, quantization and tiles, those that go together and with the rest."""

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

#: options of offload, from the one that costs least; and of quantization those that save memory and little else
OFFLOADS = ("none", "modulation", "text_encoder", "expert", "model", "layerwise", "disk")
QUANTIZATIONS = ("none", "fp8_weight_only", "int8_weight_only")
COUNT = 3
#: settings whose times differ by less than this share cost the same: less changed, and lossless, comes first then
SAME = 0.02


@dataclass(frozen=True)
class Suggestion:
    """A setting that fits, by what is to be changed for it."""

    overrides: tuple[str, ...]
    #: what takes the place of the configuration's sections
    changes: dict[str, dict[str, Any]]
    #: whether the pictures stay the same
    lossless: bool
    peak: int
    seconds: float | None


def find_suggestions(
    config: dict[str, Any], rehearsed: DryForwardResult, device: DeviceSpec, tiled: DryForwardResult | None = None
) -> list[Suggestion]:
    """At most three, the cheapest first; `tiled`: a rehearsal with tiles in the VAE, to be considered too."""
    fitting = list(list_candidates(config, config["vae"]["tiling"], rehearsed, device))
    if tiled:
        fitting += list_candidates(config, True, tiled, device)
    least = min((one.seconds or 0 for one in fitting), default=0)
    return sorted(fitting, key=lambda one: make_sort_key(one, least))[:COUNT]


def list_candidates(
    config: dict[str, Any], tiling: bool, rehearsed: DryForwardResult, device: DeviceSpec
) -> Iterator[Suggestion]:
    """Everything that fits and goes together."""
    offloads, quantizations = (
        list_options(config, "offload", OFFLOADS),
        list_options(config, "quantization", QUANTIZATIONS),
    )
    vae = {**config["vae"], "tiling": tiling}
    for offload, quantization in itertools.product(offloads, quantizations):
        changes = {"offload": offloads[offload], "quantization": quantizations[quantization], "vae": vae}
        changed = {**config, **changes}
        if any(compatibility.find_violations(changed)) or not has_enough_blocks(changes["offload"], rehearsed):
            continue
        found = Estimate(rehearsed, WeightSettings.from_config(changed), device)
        if found.fits:
            words = {"offload": offload, "quantization": quantization}
            overrides = [f"{name}={word}" for name, word in words.items() if changes[name] != config[name]]
            overrides += [f"vae.tiling={str(tiling).lower()}"] if vae != config["vae"] else []
            lossless = quantization == "none" and not tiling
            yield Suggestion(tuple(overrides), changes, lossless, found.peak, found.seconds)


def has_enough_blocks(offload: dict[str, Any], rehearsed: DryForwardResult) -> bool:
    """Whether the model has as many blocks as an offload with blocks in turn needs."""
    try:
        check_offloaded_blocks(offload, next(len(one.blocks) for one in rehearsed.components if one.name == HIGH_NOISE))
    except UsageError:
        return False
    return True


def list_options(config: dict[str, Any], group: str, names: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """The options of those names, and what is asked for, if it is none of them."""
    shipped = read_options(group)
    found = {name: shipped[name] for name in names}
    return found if config[group] in found.values() else found | {"as asked": config[group]}


def make_sort_key(one: Suggestion, least: float) -> tuple[Any, ...]:
    """What to sort by: time, in steps within which all is the same; then other numbers; then how much is changed."""
    steps = 0 if not least else round(((one.seconds or 0) / least - 1) / SAME)
    chosen = [override.removeprefix("offload=") for override in one.overrides]
    place = sum(OFFLOADS.index(name) for name in chosen if name in OFFLOADS)
    return steps, not one.lossless, len(one.overrides), place
