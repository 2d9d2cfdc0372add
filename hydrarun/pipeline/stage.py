"""A pipeline is a list of stages: their interface, and the functions that check and run the list."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from hydrarun.acceleration.cache.base import Cache, NoCache
from hydrarun.acceleration.offload.modulation_tables import ModulationTables
from hydrarun.acceleration.offload.strategies import USES, NoOffload
from hydrarun.core.distributed.mesh import Mesh
from hydrarun.core.errors import (
    ReportedError,
    RunError,
    UsageError,
    describe_import_error,
    is_host_memory_error,
    suggest_name,
)
from hydrarun.core.progress import Progress
from hydrarun.core.timing import Timings
from hydrarun.models.experts import Experts
from hydrarun.models.transformer import Transformer
from hydrarun.pipeline.guidance import ClassifierFreeGuidance
from hydrarun.pipeline.state import State

#: whose classes a checkpoint's components are
LIBRARIES = ("diffusers", "transformers")


@dataclass
class Components:
    """The loaded components that the stages use."""

    experts: Experts
    #: the model's diffusers pipeline without its transformers: text encoder, VAE, scheduler and their methods
    pipeline: Any
    guidance: ClassifierFreeGuidance
    #: latent pixels per token, along one side
    patch_size: int
    device: torch.device
    dtype: torch.dtype
    progress: Progress
    #: the cache between the loop and the transformers' blocks; a runner may replace it for each request
    cache: Cache = field(default_factory=NoCache)
    #: in a warm-up, how many steps of each kind (`find_step_kind`) run; None: a full run of all steps
    warmup: int | None = None
    #: the mesh of ranks; None: there is one process
    mesh: Mesh | None = None
    #: modulation tables that replace the modulation weights, by transformer; empty: the weights are loaded
    tables: Mapping[str, ModulationTables] = field(default_factory=dict)
    #: decides which of the components are on the device
    offload: NoOffload = field(default_factory=NoOffload)

    def transformer(self, expert: str) -> Transformer:
        """Return the transformer of that name, on the device."""
        self.offload.load_expert(expert)
        return self.experts[expert]


class Stage:
    """One step from a request to pictures.

    `needs` and `gives` name fields of `State`. `phase` names the entry of `Timings.phases` that the stage's time is
    added to. `uses` names the weights that it computes with (`offload.strategies.USES`); other stages may offload them.
    """

    needs: tuple[str, ...] = ()
    gives: tuple[str, ...] = ()
    phase: str = ""
    uses: tuple[str, ...] = ()

    def __call__(self, state: State, parts: Components, timings: Timings) -> None:
        """Read the `needs` fields of `state` and set the `gives` fields."""
        raise NotImplementedError


def check_stages(stages: Sequence[Stage]) -> None:
    """Check that each stage's needs are given before it and that frames are given. Raises `UsageError` otherwise."""
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
    """Run the stages in order, without gradients, and add each one's time to its phase."""
    with torch.inference_mode(), timings.watch_compiler():
        for stage in stages:
            with timings.phase(stage.phase), translate_library_errors(stage, parts):
                parts.offload.prepare_stage(stage.uses)
                stage(state, parts, timings)


@contextmanager
def translate_library_errors(stage: Stage, parts: Components) -> Iterator[None]:
    """Turn an error that a component's library raises into a one-line `RunError`.

    Some values of a checkpoint's config.json fail only when its modules run. An error of our own keeps its traceback.
    """
    try:
        yield
    except (ReportedError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        library = find_raising_library(error)
        # losing another rank is a RuntimeError too, and not the cause of a failure
        lost = isinstance(error, RuntimeError) and parts.mesh is not None
        if library is None or lost or is_host_memory_error(error):
            raise
        where = " and ".join(stage.uses) or stage.phase
        raise RunError(
            f"{where}: {library} fails with {type(error).__name__}: {describe_import_error(error)}. A value in the"
            " checkpoint's config.json may be wrong, or the library's version"
        ) from error


def find_raising_library(error: BaseException) -> str | None:
    """Return the library of components that our code called when the error was raised; None if it called none."""
    library, trace = None, error.__traceback__
    while trace:
        package = str(trace.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
        library = None if package == "hydrarun" else package if package in LIBRARIES else library
        trace = trace.tb_next
    return library
