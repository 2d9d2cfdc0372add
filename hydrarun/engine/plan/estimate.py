"""Runs one dry forward of a configuration: component sizes, and each stage's activations and work. For rank 0."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image

from hydrarun.acceleration.cache.base import Cache
from hydrarun.acceleration.parallel.data import find_own_indices
from hydrarun.acceleration.parallel.sequence import SequenceParallel
from hydrarun.config.targets import instantiate, load_class
from hydrarun.core.device import DTYPES
from hydrarun.core.distributed.degrees import Degrees, world_size
from hydrarun.core.distributed.mesh import Mesh
from hydrarun.core.errors import RunError, UsageError
from hydrarun.core.inputs import image_paths
from hydrarun.core.progress import Progress
from hydrarun.engine.plan import meta_components, weights
from hydrarun.engine.plan.configs import ComponentConfigs
from hydrarun.engine.plan.dry_forward import DryForward, StageEstimate
from hydrarun.engine.plan.meter import META, Meter, RepeatedBlocks
from hydrarun.engine.plan.weights import ComponentSize
from hydrarun.models.experts import NAMES, Experts, find_boundary
from hydrarun.models.layers.tensor_parallel import shard_layers
from hydrarun.models.transformer import Transformer
from hydrarun.models.weights.config_size import build_on_meta, check_counts
from hydrarun.outputs.media import images, kinds
from hydrarun.pipeline.components import quiet_libraries
from hydrarun.pipeline.request import make_state
from hydrarun.pipeline.schedulers import add_class_name, make_scheduler
from hydrarun.pipeline.stage import Components, Stage
from hydrarun.pipeline.state import State
from hydrarun.pipeline.vae import configure_vae


@dataclass(frozen=True)
class DryForwardResult:
    """The part of a plan that all its settings share: components, and stages with everything on the device."""

    components: tuple[ComponentSize, ...]
    estimates: tuple[StageEstimate, ...]
    #: rows of the modulation tables
    table_rows: int


def run_dry_forward(config: dict[str, Any], configs: ComponentConfigs, dtype: torch.dtype) -> DryForwardResult:
    """Run the stages on the meta device. Raises `UsageError` for a configuration that cannot run."""
    model, vae_dtype = config["model"], DTYPES.get(config["vae"]["dtype"], dtype)
    meter = Meter()
    with fake_process_group(config["parallel"]) as mesh, quiet_libraries():
        stages: list[Stage] = [instantiate(node, f"model.stages[{i}]") for i, node in enumerate(model["stages"])]
        scheduler = make_scheduler(config, add_class_name(configs.index, configs.components.get("scheduler", {})))
        made = meta_components.make_meta_modules(configs, dtype, vae_dtype)
        pipeline = meta_components.make_meta_pipeline(
            load_class(model["pipeline"], "model.pipeline"), configs, made, scheduler, meter
        )
        cls = load_class(model["transformer"], "model.transformer")
        transformers = {
            name: build_meta_transformer(cls, configs, name, dtype, mesh) for name in NAMES[: model["experts"]]
        }
        components = (
            *(weights.measure_encoder(name, module) for name, module in made.items()),
            *(weights.measure_transformer(name, module) for name, module in transformers.items()),
        )
        configure_vae(pipeline.vae, config["vae"], mesh)
        parts = Components(
            experts=Experts(transformers, find_boundary(pipeline)),
            pipeline=pipeline,
            guidance=instantiate(model["guidance"], "model.guidance"),
            patch_size=model["patch_size"],
            device=META,
            dtype=dtype,
            progress=Progress(quiet=True),
            cache=instantiate(config["cache"], "cache"),
            mesh=mesh,
        )
        play = DryForward(stages, parts, meter)
        for module in (*made.values(), *transformers.values()):
            meter.leave_out(module)
        for transformer in transformers.values():
            shorten_blocks(transformer, meter, 2 + count_always_run(parts.cache))
            if mesh and (mesh["ulysses"] or mesh["ring"]):
                transformer.shard_tokens(SequenceParallel(mesh["ulysses"], mesh["ring"]))
        state = make_state(config["sampling"], load_input_images(config))
        if mesh and (axis := mesh["data"]):
            state = state.select(find_own_indices(len(state.prompts), axis))
        with translate_config_errors(configs):
            estimates = play.run(state)
    steps = config["sampling"]["num_inference_steps"]
    return DryForwardResult(components, tuple(estimates), steps * count_table_rows(transformers["transformer"], state))


@contextmanager
def translate_config_errors(configs: ComponentConfigs) -> Iterator[None]:
    """Turn an error of a dry forward into a one-line `RunError` if the configs are in a folder: they do not fit."""
    try:
        yield
    except (RunError, UsageError):
        raise
    except Exception as error:
        if configs.folder is None:
            raise
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RunError(f"{configs.said}: the configs of its components do not fit each other: {first}") from error


def build_meta_transformer(
    cls: type[Transformer], configs: ComponentConfigs, name: str, dtype: torch.dtype, mesh: Mesh | None
) -> Transformer:
    """Build one transformer on the meta device: this rank's tensor-parallel shard."""
    known = inspect.signature(cls).parameters
    arguments = {key: value for key, value in configs.config(name).items() if key in known}
    where = f"{configs.said}: {name}/config.json"
    check_counts(where, arguments)
    transformer = build_on_meta(where, lambda: cls(**arguments))
    transformer.config = arguments
    if mesh and mesh["tensor"]:
        shard_layers(transformer, mesh["tensor"])
    meta_components.cast_module(transformer, dtype, cls.keep_in_float32)
    return transformer


def shorten_blocks(transformer: Transformer, meter: Meter, kept: int) -> None:
    """Keep `kept` blocks of each kind in each list of blocks. They count for all."""
    for name in transformer.block_lists:
        RepeatedBlocks(getattr(transformer, name), meter, kept)


def count_always_run(cache: Cache) -> int:
    """Return the number of blocks that a cache always runs, even in skipped steps."""
    return getattr(cache, "always", 0)


def count_table_rows(transformer: Transformer, state: State) -> int:
    """Count a step's rows of modulation tables: one, or one per item and branch if they depend on the conditioning."""
    accepted = inspect.signature(transformer.make_temb).parameters
    conditioned = any(accepted.keys() & one.keys() for one in state.conditioning.values())
    return len(state.conditioning) * len(state.latents) if conditioned else 1


def load_input_images(config: dict[str, Any]) -> list[Image.Image]:
    """Load the input images. If none are given, return the required number of blank one-megapixel images."""
    paths, alpha = image_paths(config), kinds.find_model_kind(config["model"]).alpha
    if paths:
        return [images.read_image(path, alpha).image for path in paths]
    return [Image.new("RGBA" if alpha else "RGB", (1024, 1024)) for _ in range(config["model"]["input_images"][0])]


@contextmanager
def fake_process_group(degrees: Degrees) -> Iterator[Mesh | None]:
    """Yield rank 0's mesh in a fake process group: bytes sent are counted, nothing is received. None for one rank."""
    if world_size(degrees) == 1:
        yield None
        return
    if dist.is_initialized():
        raise UsageError("plan: this process has a process group already: plan in another, by `hydrarun plan …`")
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend `fake`

    dist.init_process_group("cpu:fake,meta:fake", rank=0, world_size=world_size(degrees), store=FakeStore())
    try:
        yield Mesh(degrees, torch.device("cpu"))
    finally:
        dist.destroy_process_group()
