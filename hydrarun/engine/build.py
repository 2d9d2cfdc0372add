"""Assembly: builds loaded components from a configuration, in one readable order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from hydrarun.acceleration.cache.base import Cache
from hydrarun.acceleration.offload.modulation_tables import ModulationOffload, ModulationTables
from hydrarun.acceleration.parallel.hsdp import is_sharded, shard_encoder, shard_transformer
from hydrarun.acceleration.parallel.sequence import SequenceParallel
from hydrarun.acceleration.quantization import NoQuantization
from hydrarun.config.checks.checkpoint import check_folder_fit
from hydrarun.config.checks.components import check_component_files
from hydrarun.config.checks.report import REPEAT
from hydrarun.config.hub import WeightsSource, resolve_weights
from hydrarun.config.targets import instantiate, load_class
from hydrarun.core.device import DTYPES, choose_device, choose_dtype, reset_peak_bytes
from hydrarun.core.distributed.degrees import world_size
from hydrarun.core.distributed.mesh import Mesh
from hydrarun.core.distributed.rank import rank_info
from hydrarun.core.errors import UsageError
from hydrarun.core.progress import Progress
from hydrarun.core.resources import read_options
from hydrarun.core.threads import ThreadPool
from hydrarun.models.experts import NAMES, Experts, find_boundary
from hydrarun.models.layers.attention import AttentionBackend
from hydrarun.models.transformer import Transformer
from hydrarun.models.weights.checksums import verify_checksums
from hydrarun.models.weights.loader import load_transformer
from hydrarun.models.weights.safetensors import check_folder, fingerprint_weights
from hydrarun.pipeline.components import load_module, load_pipeline, quiet_libraries
from hydrarun.pipeline.schedule_check import check_schedules
from hydrarun.pipeline.schedulers import make_scheduler, read_scheduler
from hydrarun.pipeline.stage import Components, Stage, check_stages
from hydrarun.pipeline.vae import configure_vae


@dataclass
class LoadedPipeline:
    """A pipeline, ready to run."""

    parts: Components
    stages: list[Stage]
    source: WeightsSource
    attention: AttentionBackend
    quantization: NoQuantization
    #: the cache of the configuration's own node
    cache: Cache
    #: bytes of weights that this process read, and the seconds that it took
    read_bytes: int
    read_s: float


def build_pipeline(config: dict[str, Any], progress: Progress, device_name: str) -> LoadedPipeline:
    """Build a pipeline. Refuses everything that can be refused before it reads the first weight."""
    model = config["model"]
    device = choose_device(device_name, progress)
    reset_peak_bytes(device)
    dtype = choose_dtype(config["dtype"], device, progress)
    attention = instantiate(config["attention"], "attention")
    compiler = instantiate(config["compile"], "compile")
    quantization = instantiate(config["quantization"], "quantization")
    guidance = instantiate(model["guidance"], "model.guidance")
    with quiet_libraries():
        stages = [instantiate(node, f"model.stages[{index}]") for index, node in enumerate(model["stages"])]
        transformer_class = load_class(model["transformer"], "model.transformer")
        pipeline_class = load_class(model["pipeline"], "model.pipeline")
        quantization.prepare(device)
    offload = instantiate(config["offload"], "offload")
    tabled = isinstance(offload, ModulationOffload)
    if offload.needs_device and device.type == "cpu":  # device=auto may have chosen it
        raise UsageError(
            "offload: on the CPU the host is the device: there is nothing to offload to. Use offload=none."
        )
    check_stages(stages)
    mesh = Mesh(config["parallel"], device) if world_size(config["parallel"]) > 1 else None
    source = resolve_weights(model)
    check_component_files(source.folder)
    check_folder_fit(config, source.folder)
    check_folder(source.folder)
    with quiet_libraries():
        saved = read_scheduler(source.folder)
        scheduler = make_scheduler(config, saved)
        check_schedules(config, stages, scheduler, saved, source.folder)
    if config["verify"] and rank_info().local_rank == 0:  # one rank of each machine; if it fails, all end
        verify_checksums(source.folder, progress)
    cache = make_cache(config["cache"], source.folder)

    vae_dtype = DTYPES.get(config["vae"]["dtype"], dtype)
    place = partial(offload.load_device, device=device)
    with progress.reading("loading weights") as tally, ThreadPool() as pool:

        def fill_transformers() -> dict[str, Transformer]:
            return {
                name: load_transformer(
                    transformer_class,
                    source.folder / name,
                    device=place(name),
                    dtype=dtype,
                    note=progress.note,
                    pool=pool,
                    tally=tally,
                    axis=mesh["tensor"] if mesh else None,
                    left=offload.skip_loading,
                    loaded=quantization.loaded,
                )
                for name in NAMES[: model["experts"]]
            }

        transformers = {} if quantization.changes else fill_transformers()
        pipeline = load_pipeline(  # while the transformers are read
            pipeline_class,
            source.folder,
            place=place,
            dtype=dtype,
            vae_dtype=vae_dtype,
            scheduler=scheduler,
            tally=tally,
        )
        for name, component in pipeline.components.items():
            quantization.component(name, component)
        transformers = transformers or fill_transformers()
    read_s = tally.seconds
    if said := quantization.summary():
        progress.note(said)
    tables = {
        name: ModulationTables(transformer, source.folder / name, device, dtype, progress)
        for name, transformer in transformers.items()
        if tabled
    }
    configure_vae(pipeline.vae, config["vae"], mesh)
    for transformer in transformers.values():
        transformer.set_attention_backend(attention)
        if mesh:
            shard_by_mesh(transformer, mesh)
        compiler.apply(transformer, alone=mesh is None)
    if mesh and config["parallel"]["hsdp_degree"] > 1:
        for name, module in pipeline.components.items():
            if isinstance(module, nn.Module) and is_sharded(name):
                shard_encoder(module, mesh)

    def read_again(name: str) -> nn.Module:
        module = load_module(pipeline_class, source.folder, name, dtype)
        quantization.component(name, module)
        return module

    modules = {name: module for name, module in pipeline.components.items() if isinstance(module, nn.Module)}
    offload.attach(modules | transformers, device, read_again, source.folder, dtype)
    experts = Experts(transformers, find_boundary(pipeline))
    shared = {"mesh": mesh, "offload": offload, "tables": tables}
    parts = Components(experts, pipeline, guidance, model["patch_size"], device, dtype, progress, **shared)
    return LoadedPipeline(parts, stages, source, attention, quantization, cache, tally.done, read_s)


def make_cache(node: dict[str, Any], folder: Path) -> Cache:
    """Build the cache of a `cache` node, for the weights in `folder`.

    Raises `UsageError` for invalid arguments, and for TeaCache coefficients that were fitted on other weights.
    """
    fit = (node.get("gate") or {}).get("fit") or {}
    if fit.get("weights") and fit["weights"] != fingerprint_weights(folder):
        raise UsageError(
            f"cache.gate.fit: the coefficients were fitted on other weights than those in {folder}; make them for"
            f" these: hydrarun calibrate model={fit['model']} model.path=… cache=teacache input.prompts=prompts.txt"
        )
    return instantiate(node, "cache")


def shard_by_mesh(transformer: Transformer, mesh: Mesh) -> None:
    """Shard a loaded transformer's tokens and weights across the ranks."""
    if mesh["ulysses"] or mesh["ring"]:
        transformer.shard_tokens(SequenceParallel(mesh["ulysses"], mesh["ring"]))
    if mesh.degrees["hsdp_degree"] > 1:
        shard_transformer(transformer, mesh)


def make_backends(config: Mapping[str, Any]) -> dict[str, AttentionBackend | None]:
    """Build the attention backend of each entry of `report.noise_floor`; None is the run's own.

    Raises UsageError for a backend that this machine lacks.
    """
    nodes = {
        name: None if name == REPEAT else read_options("attention")[name] for name in config["report"]["noise_floor"]
    }
    return {name: node and instantiate(node, "report.noise_floor") for name, node in nodes.items()}
