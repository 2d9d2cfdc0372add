"""What a setting takes on a device: bytes and seconds by phase."""

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
#: bytes per second that blocks are read with from a disk: a usual NVMe one
DISK = 3e9


@dataclass(frozen=True)
class Phase:
    """The largest stage of a phase, in bytes; and the work of all its stages."""

    name: str
    weights: int
    activations: int
    #: of the activations, what a cache keeps from step to step
    cache: int
    #: floating-point operations
    flops: float
    #: bytes to other ranks
    sent: float
    #: at the device's rates, with nothing lost between; None: they are not known
    seconds: float | None

    @property
    def peak(self) -> int:
        """Bytes on the device."""
        return self.weights + self.activations


@dataclass(frozen=True)
class WeightSettings:
    """What of a configuration decides how weights are held."""

    offload: NoOffload
    #: the node of the group
    quantization: Mapping[str, Any]
    hsdp_degree: int = 1

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> WeightSettings:
        """That of a configuration."""
        offload = instantiate(config["offload"], "offload")
        return cls(offload, config["quantization"], config["parallel"]["hsdp_degree"])

    def make_layout(self, rehearsed: DryForwardResult) -> WeightLayout:
        """How they are."""
        rows = rehearsed.table_rows if isinstance(self.offload, ModulationOffload) else None
        quantized = frozenset(self.quantization.get("components") or ())
        return WeightLayout(quantized, ROW_BYTES.get(self.quantization.get("weights", ""), 0), rows, self.hsdp_degree)


class Estimate:
    """A rehearsed configuration with one setting on one device."""

    def __init__(self, rehearsed: DryForwardResult, setting: WeightSettings, device: DeviceSpec) -> None:
        self.rehearsed, self.setting, self.device = rehearsed, setting, device
        self.held = setting.make_layout(rehearsed)
        #: bytes on the host of what waits for its turn there
        self.host = count_host_bytes(rehearsed.components, self.held, setting.offload) if device.kind != "cpu" else 0
        weights = list_device_bytes(
            rehearsed.components, [act.uses for act in rehearsed.acts], self.held, setting.offload
        )
        self.phases = [self.phase(name, weights) for name in PHASES]

    @property
    def peak(self) -> int:
        """The most bytes that are on the device."""
        return max(phase.peak for phase in self.phases)

    @property
    def fits(self) -> bool:
        return self.peak <= self.device.memory

    @property
    def seconds(self) -> float | None:
        """Of all phases."""
        each = [phase.seconds for phase in self.phases]
        return None if None in each else sum(each)  # type: ignore[arg-type]

    def phase(self, name: str, weights: Sequence[int]) -> Phase:
        """One phase; `weights`: bytes on the device in each stage."""
        own = [(size, act) for size, act in zip(weights, self.rehearsed.acts, strict=True) if act.phase == name]
        size, largest = max(own, key=lambda one: one[0] + self.count_activations(one[1]))
        work = sum((act.work for _, act in own), Work())
        sent = work.sent_bytes + sum(self.count_gathered_bytes(act) for _, act in own)
        seconds = [self.seconds_of(act) for _, act in own]
        total = None if None in seconds else sum(seconds)  # type: ignore[arg-type]
        return Phase(name, size, self.count_activations(largest), largest.cache, work.flops, sent, total)

    def list_used(self, act: StageEstimate) -> Iterator[ComponentSize]:
        """The components that a stage runs; of experts, which take turns, the first."""
        return (c for c in self.rehearsed.components if find_use(c.name) in act.uses and c.name != LOW_NOISE)

    def count_activations(self, act: StageEstimate) -> int:
        """Bytes beside the weights: activations, and a quantized weight unpacked while it is multiplied with."""
        unpacked = (c.largest for c in self.list_used(act) if find_use(c.name) in self.held.quantized)
        return act.activations + max(unpacked, default=0)

    def count_gathered_bytes(self, act: StageEstimate) -> float:
        """Bytes that HSDP sends: of every component that runs, this rank's share to each of the others."""
        ranks = self.held.shards
        return sum(
            sum(self.held.count_sizes(c)[1]) * (ranks - 1) / ranks * act.forwards
            for c in self.list_used(act)
            if is_sharded(c.name)
        )

    def seconds_of(self, act: StageEstimate) -> float | None:
        """Compute, or weights that come meanwhile, if that takes longer; then what is sent to other ranks."""
        device = self.device
        if device.float16 is None or device.link is None or device.host is None:
            return None
        rate = device.float16
        if self.setting.quantization.get("activations", "none") != "none" and device.float8:
            rate = device.float8
        compute = act.work.linear_flops / rate + act.work.attention_flops / device.float16
        source = DISK if isinstance(self.setting.offload, DiskOffload) else device.host
        moved = (
            sum(
                count_active_bytes(c, self.held, self.setting.offload)
                for c in self.list_used(act)
                if self.is_offloaded(c)
            )
            / source
        )
        blocks = (
            sum(count_streamed_bytes(c, self.held, self.setting.offload) for c in self.list_used(act))
            * act.forwards
            / source
        )
        return max(compute, blocks) + moved + (act.work.sent_bytes + self.count_gathered_bytes(act)) / device.link

    def is_offloaded(self, component: ComponentSize) -> bool:
        """Whether it is away from the device while it is not used."""
        return find_use(component.name) in self.setting.offload.moves
