"""Estimates the bytes and seconds of a setting on a device, by phase."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydrarun.acceleration.offload.modulation_tables import ModulationOffload
from hydrarun.acceleration.offload.strategies import DiskOffload, NoOffload, find_use
from hydrarun.acceleration.parallel.hsdp import is_sharded
from hydrarun.acceleration.quantization import ROW_BYTES
from hydrarun.config.targets import instantiate
from hydrarun.engine.plan.devices import DeviceSpec
from hydrarun.engine.plan.dry_forward import StageEstimate
from hydrarun.engine.plan.estimate import DryForwardResult
from hydrarun.engine.plan.meter import Work
from hydrarun.engine.plan.weights import (
    ComponentSize,
    WeightLayout,
    count_active_bytes,
    count_host_bytes,
    count_streamed_bytes,
    list_device_bytes,
)
from hydrarun.models.experts import LOW_NOISE

PHASES = ("encode", "denoise", "decode")
#: bytes per second for reading blocks from disk, as of a typical NVMe drive
DISK = 3e9


@dataclass(frozen=True)
class Phase:
    """The bytes of a phase's largest stage, and the work of all its stages."""

    name: str
    weights: int
    activations: int
    #: the part of the activations that a cache keeps from step to step
    cache: int
    #: floating-point operations
    flops: float
    #: bytes sent to other ranks
    sent: float
    #: lower bound at the device's rates; None: the rates are unknown
    seconds: float | None

    @property
    def peak(self) -> int:
        """Bytes on the device."""
        return self.weights + self.activations


@dataclass(frozen=True)
class WeightSettings:
    """The parts of a configuration that decide the size and place of weights."""

    offload: NoOffload
    #: the config node of the group
    quantization: Mapping[str, Any]
    hsdp_degree: int = 1

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> WeightSettings:
        """Read the settings of a configuration."""
        offload = instantiate(config["offload"], "offload")
        return cls(offload, config["quantization"], config["parallel"]["hsdp_degree"])

    def make_layout(self, dry_run: DryForwardResult) -> WeightLayout:
        """Return the layout of the weights."""
        rows = dry_run.table_rows if isinstance(self.offload, ModulationOffload) else None
        quantized = frozenset(self.quantization.get("components") or ())
        return WeightLayout(quantized, ROW_BYTES.get(self.quantization.get("weights", ""), 0), rows, self.hsdp_degree)


class Estimate:
    """The estimate of a dry forward with one setting on one device."""

    def __init__(self, dry_run: DryForwardResult, setting: WeightSettings, device: DeviceSpec) -> None:
        self.dry_run, self.setting, self.device = dry_run, setting, device
        self.held = setting.make_layout(dry_run)
        #: bytes of offloaded weights on the host
        self.host = count_host_bytes(dry_run.components, self.held, setting.offload) if device.kind != "cpu" else 0
        weights = list_device_bytes(
            dry_run.components, [estimate.uses for estimate in dry_run.estimates], self.held, setting.offload
        )
        self.phases = [self.phase(name, weights) for name in PHASES]

    @property
    def peak(self) -> int:
        """Peak bytes on the device."""
        return max(phase.peak for phase in self.phases)

    @property
    def fits(self) -> bool:
        return self.peak <= self.device.memory

    @property
    def seconds(self) -> float | None:
        """Seconds of all phases; None: unknown."""
        each = [phase.seconds for phase in self.phases]
        return None if None in each else sum(each)  # type: ignore[arg-type]

    def phase(self, name: str, weights: Sequence[int]) -> Phase:
        """Estimate one phase. `weights`: bytes of weights on the device in each stage."""
        own = [
            (size, estimate)
            for size, estimate in zip(weights, self.dry_run.estimates, strict=True)
            if estimate.phase == name
        ]
        size, largest = max(own, key=lambda one: one[0] + self.count_activations(one[1]))
        work = sum((estimate.work for _, estimate in own), Work())
        sent = work.sent_bytes + sum(self.count_gathered_bytes(estimate) for _, estimate in own)
        seconds = [self.seconds_of(estimate) for _, estimate in own]
        total = None if None in seconds else sum(seconds)  # type: ignore[arg-type]
        return Phase(name, size, self.count_activations(largest), largest.cache, work.flops, sent, total)

    def list_used(self, estimate: StageEstimate) -> Iterator[ComponentSize]:
        """Yield the components that a stage runs. Of two experts, which run one at a time, yields the first."""
        return (c for c in self.dry_run.components if find_use(c.name) in estimate.uses and c.name != LOW_NOISE)

    def count_activations(self, estimate: StageEstimate) -> int:
        """Return the bytes in addition to weights: activations, and one weight dequantized for its matrix product."""
        unpacked = (c.largest for c in self.list_used(estimate) if find_use(c.name) in self.held.quantized)
        return estimate.activations + max(unpacked, default=0)

    def count_gathered_bytes(self, estimate: StageEstimate) -> float:
        """Return the bytes that HSDP sends: this rank's shard of each component that runs, to every other rank."""
        ranks = self.held.shards
        return sum(
            sum(self.held.count_sizes(c)[1]) * (ranks - 1) / ranks * estimate.forwards
            for c in self.list_used(estimate)
            if is_sharded(c.name)
        )

    def seconds_of(self, estimate: StageEstimate) -> float | None:
        """Return the longer of compute and prefetched blocks, plus onloading weights and sending to other ranks."""
        device = self.device
        if device.float16 is None or device.link is None or device.host is None:
            return None
        rate = device.float16
        if self.setting.quantization.get("activations", "none") != "none" and device.float8:
            rate = device.float8
        compute = estimate.work.linear_flops / rate + estimate.work.attention_flops / device.float16
        source = DISK if isinstance(self.setting.offload, DiskOffload) else device.host
        moved = (
            sum(
                count_active_bytes(c, self.held, self.setting.offload)
                for c in self.list_used(estimate)
                if self.is_offloaded(c)
            )
            / source
        )
        blocks = (
            sum(count_streamed_bytes(c, self.held, self.setting.offload) for c in self.list_used(estimate))
            * estimate.forwards
            / source
        )
        return (
            max(compute, blocks)
            + moved
            + (estimate.work.sent_bytes + self.count_gathered_bytes(estimate)) / device.link
        )

    def is_offloaded(self, component: ComponentSize) -> bool:
        """Return whether a component is off the device while it is not in use."""
        return find_use(component.name) in self.setting.offload.moves
