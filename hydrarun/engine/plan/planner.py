"""Plans a configuration: its memory and time, its conflicts, and settings that would fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hydrarun.config import batches
from hydrarun.config.checks import compatibility
from hydrarun.config.checks.checkpoint import check_checkpoint_configs
from hydrarun.config.checks.configuration import check_sections
from hydrarun.config.compose import ConfigOrigin
from hydrarun.core.distributed.degrees import world_size
from hydrarun.core.errors import UsageError
from hydrarun.engine.plan.devices import DeviceSpec, find_device, read_local_device

if TYPE_CHECKING:
    from hydrarun.engine.plan.memory_model import Estimate
    from hydrarun.engine.plan.suggest import Suggestion


@dataclass(frozen=True)
class Plan:
    """The result of `hydrarun plan`."""

    model: str
    device: DeviceSpec
    ranks: int
    #: violated rules, each with its fix; if there are any, the fields below are empty
    conflicts: list[str]
    #: the source of the shapes
    source: str = ""
    #: the estimate of the configuration as given
    asked: Estimate | None = None
    steps: int = 0
    #: bytes of each component's weights
    components: dict[str, int] = field(default_factory=dict)
    suggestions: list[Suggestion] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        return self.asked is not None and self.asked.fits


def make_plan(config: dict[str, Any], origin: ConfigOrigin | None = None) -> Plan:
    """Plan a composed configuration. Raises `UsageError` for invalid values."""
    asked = config
    config = batches.resolve_prompts({**config, "plan": {"auto": False, "device": None}})
    check_sections(fill_images(config), origin)
    device = find_plan_device(asked)  # imports torch
    config = {**config, "device": device.kind}
    ranks = world_size(config["parallel"])
    conflicts = list(
        dict.fromkeys(text for _, one in batches.iterate_lines(config) for text in compatibility.format_violations(one))
    )
    if conflicts:
        return Plan(config["model"]["name"], device, ranks, conflicts)
    return plan_configuration(find_largest_batch(config), device, ranks)


def find_largest_batch(config: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration of the batch with the most pixels; for a single run, that of the run."""
    if not batches.is_batch_run(config):
        return config
    every = batches.group_batches(batches.list_items(config), batches.max_batch_size(config))

    def pixels(batch: Sequence[batches.BatchItem]) -> int:
        sizes = (batch[0].sampling[name] or 1 for name in ("height", "width", "num_frames", "layers"))
        return len(batch) * math.prod(sizes)

    return batches.derive_batch_config(config, max(every, key=pixels))


def fill_images(config: dict[str, Any]) -> dict[str, Any]:
    """Fill in the required number of image names if none are given. The plan then uses blank images."""
    least = config["model"]["input_images"][0]
    if config["input"]["images"] is not None or not least:
        return config
    return {**config, "input": {**config["input"], "images": [f"blank{number}.png" for number in range(least)]}}


def find_plan_device(config: dict[str, Any]) -> DeviceSpec:
    """Return the device to plan for: a published one, or this machine's. Raises `UsageError` if it is not there."""
    name = config["plan"]["device"]
    if name is not None:
        if config["device"] == "cpu":
            raise UsageError(f"plan.device={name} conflicts with device=cpu: leave out one of them")
        return find_device(name)
    from hydrarun.core.device import choose_device
    from hydrarun.core.progress import Progress

    return read_local_device(choose_device(config["device"], Progress(quiet=True)))


def plan_configuration(config: dict[str, Any], device: DeviceSpec, ranks: int) -> Plan:
    """Plan a configuration that has no conflicts."""
    import torch

    from hydrarun.core.device import choose_dtype
    from hydrarun.core.progress import Progress
    from hydrarun.engine.plan.configs import find_configs
    from hydrarun.engine.plan.estimate import run_dry_forward
    from hydrarun.engine.plan.memory_model import Estimate, WeightSettings
    from hydrarun.engine.plan.suggest import find_suggestions

    configs = find_configs(config["model"])
    check_checkpoint_configs(
        config, configs.index, *(configs.components.get(name, {}) for name in ("vae", "transformer"))
    )
    dtype = choose_dtype(config["dtype"], torch.device(device.kind), Progress(quiet=True))
    dry_run = run_dry_forward(config, configs, dtype)
    setting = WeightSettings.from_config(config)
    found = find_suggestions(config, dry_run, device)
    if len(found) < 3 and can_tile(config):
        tiled = {**config, "vae": {**config["vae"], "tiling": True}}
        found = find_suggestions(config, dry_run, device, run_dry_forward(tiled, configs, dtype))
    return Plan(
        config["model"]["name"],
        device,
        ranks,
        [],
        configs.said,
        Estimate(dry_run, setting, device),
        config["sampling"]["num_inference_steps"],
        {component.name: component.all.plain for component in dry_run.components},
        found,
    )


def can_tile(config: dict[str, Any]) -> bool:
    """Return whether VAE tiling could be used and is not."""
    return not config["vae"]["tiling"] and config["parallel"]["vae_degree"] == 1


def fit_configuration(config: dict[str, Any], note: Callable[[str], None]) -> dict[str, Any]:
    """Return what `plan=auto` runs: the configuration if it fits, else that with the first suggestion.

    Passes the choice to `note`. Raises `UsageError` for conflicts, and if nothing fits.
    """
    if not config["plan"]["auto"]:
        return config
    made = make_plan(config)
    plain = {**config, "plan": {"auto": False, "device": None}}
    if made.conflicts:
        raise UsageError(*made.conflicts)
    if made.fits:
        note(f"plan=auto: it fits {made.device.name} as it is")
        return plain
    if not made.suggestions:
        raise UsageError(f"plan=auto: nothing fits {made.device.name}; see hydrarun plan")
    first = made.suggestions[0]
    note(f"plan=auto: it would not fit {made.device.name}; run with {' '.join(first.overrides)}")
    return {**plain, **first.changes}


def plan_to_json(made: Plan) -> dict[str, Any]:
    """Return the plan as JSON data. docs/plan.md documents the keys."""
    return {
        "model": made.model,
        "device": {"name": made.device.name, "memory_bytes": made.device.memory},
        "source": made.source,
        "ranks": made.ranks,
        "fits": made.fits,
        "conflicts": made.conflicts,
        "peak_bytes": made.asked.peak if made.asked else None,
        "host_bytes": made.asked.host if made.asked else None,
        "seconds": made.asked.seconds if made.asked else None,
        "phases": [
            {
                "phase": phase.name,
                "weights_bytes": phase.weights,
                "activations_bytes": phase.activations,
                "cache_bytes": phase.cache,
                "peak_bytes": phase.peak,
                "flops": phase.flops,
                "sent_bytes": phase.sent,
                "seconds": phase.seconds,
            }
            for phase in (made.asked.phases if made.asked else [])
        ],
        "steps": made.steps,
        "components": made.components,
        "suggestions": [
            {
                "overrides": list(one.overrides),
                "lossless": one.lossless,
                "peak_bytes": one.peak,
                "seconds": one.seconds,
            }
            for one in made.suggestions
        ],
    }
