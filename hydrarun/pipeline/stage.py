"""A pipeline is a list of stages; this is what a stage is and how the list is checked and run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from hydrarun.acceleration.cache.base import Cache, NoCache
from hydrarun.acceleration.offload.modulation_tables import ModulationTables
from hydrarun.acceleration.offload.strategies import USES, NoOffload
from hydrarun.core.distributed.mesh import Mesh
from hydrarun.core.errors import UsageError, suggest_name
from hydrarun.core.progress import Progress
from hydrarun.core.timing import Timings
from hydrarun.models.experts import Experts
from hydrarun.models.transformer import Transformer
from hydrarun.pipeline.guidance import ClassifierFreeGuidance
from hydrarun.pipeline.state import State


@dataclass
class Components:
    """What was built and loaded, for the stages to use."""

    experts: Experts
    #: the model's diffusers pipeline without its transformers: text encoder, VAE, scheduler and their methods
    pipeline: Any
    guidance: ClassifierFreeGuidance
    #: latent pixels per token, along one side
    patch_size: int
    device: torch.device
    dtype: torch.dtype
    progress: Progress
    #: what stands between the loop and the transformers' blocks; a runner changes it from request to request
    cache: Cache = field(default_factory=NoCache)
    #: steps of each transformer that a warm-up runs; None: this is none, and all of the schedule are run
    warmup: int | None = None
    #: this rank's place among the others; None: there is one process
    mesh: Mesh | None = None
    #: what stands for the modulation weights, by the names of the transformers; empty: they are loaded as all others
    tables: Mapping[str, ModulationTables] = field(default_factory=dict)
    #: what of all this is on the device
    offload: NoOffload = field(default_factory=NoOffload)

    def transformer(self, expert: str) -> Transformer:
        """The transformer of that name, on the device."""
        self.offload.load_expert(expert)
        return self.experts[expert]


class Stage:
    """One step from a request to pictures.

    `needs` and `gives` name fields of `State`; `phase` names the sum that the stage's time goes to; `uses` names the
    weights that it computes with (`offload.strategies.USES`), which may be away from the device in other stages.
    """

    needs: tuple[str, ...] = ()
    gives: tuple[str, ...] = ()
    phase: str = ""
    uses: tuple[str, ...] = ()

    def __call__(self, state: State, parts: Components, timings: Timings) -> None:
        """Read what the stage needs from `state` and set what it gives."""
        raise NotImplementedError


def check_stages(stages: Sequence[Stage]) -> None:
    """Every stage must find what it needs, and the last result must be pictures. Raises `UsageError` otherwise."""
    known = set(State.request_fields())
    all_fields = State.request_fields() | State.stage_fields()
    for position, stage in enumerate(stages):
        label = f"model.stages[{position}] ({type(stage).__name__})"
        for name in (*stage.needs, *stage.gives):
            if name not in all_fields:
                raise UsageError(f"{label}: the state has no field {name!r}.{suggest_name(name, all_fields)}")
        for name in stage.uses:
            if name not in USES:
                raise UsageError(f"{label}: a stage can use {', '.join(USES)}, not {name!r}.{suggest_name(name, USES)}")
        missing = [name for name in stage.needs if name not in known]
        if missing:
            givers = [type(other).__name__ for other in stages[position:] if set(missing) & set(other.gives)]
            hint = f"; {givers[0]} gives it, but runs later" if givers else "; no stage of this list gives it"
            raise UsageError(f"{label} needs {', '.join(missing)}, which no stage before it gives{hint}")
        known.update(stage.gives)
    if "frames" not in known:
        raise UsageError(
            "model.stages: no stage gives frames; the last one is usually hydrarun.pipeline.stages.decode.DecodeLatents"
        )


def run_stages(stages: Sequence[Stage], state: State, parts: Components, timings: Timings) -> None:
    """Run them in order, timing each under its phase. Nothing is differentiated."""
    with torch.inference_mode(), timings.watch_compiler():
        for stage in stages:
            with timings.phase(stage.phase):
                parts.offload.prepare_stage(stage.uses)
                stage(state, parts, timings)
