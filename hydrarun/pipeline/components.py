"""The components other than the transformer: VAE, text encoder, tokenizer and scheduler.

Their classes are diffusers' and transformers', as the checkpoint names them. The model's diffusers pipeline holds them
without its transformer, so that its methods (prompt encoding, latent layout, image processing) can be called.
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hydrarun.acceleration.offload.module_mover import move_module
from hydrarun.config.checks.checkpoint import read_json
from hydrarun.config.model_choice import describe_mismatch
from hydrarun.core.device import HOST
from hydrarun.core.errors import RunError, UsageError, describe_import_error, is_host_memory_error
from hydrarun.core.progress import ByteCounter
from hydrarun.core.strict_json import INFINITE
from hydrarun.models.weights.config_size import (
    build_on_meta,
    check_counts,
    check_module_fit,
    limit_parameter_count,
)
from hydrarun.models.weights.lazy_state_dict import make_lazy_state_dict
from hydrarun.models.weights.safetensors import Checkpoint, read_checkpoint_json
from hydrarun.pipeline.processors import load_processor
from hydrarun.pipeline.stage import LIBRARIES

#: components that this package loads itself
OURS = ("transformer", "transformer_2")
#: loggers that warn, while diffusers imports torchao, about CUDA kernels that do not load and changes in torch
TORCHAO_LOGGERS = ("torchao", "torch.utils._pytree")
#: file name stem of the weights, by the library of the component's class
STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
#: file with the settings by which a transformers model samples tokens
GENERATION = "generation_config.json"


def load_pipeline(
    cls: type,
    folder: Path,
    *,
    place: Callable[[str], torch.device],
    dtype: torch.dtype,
    vae_dtype: torch.dtype,
    scheduler: Any | None,
    tally: ByteCounter,
) -> Any:
    """Load the diffusers pipeline `cls` from `folder`, without its transformers.

    `place` returns the device of a component, `scheduler` replaces the checkpoint's own, `tally` counts the bytes read.
    Raises `RunError` naming the folder and the component that cannot be used.
    """
    index = read_model_index(folder, cls)
    accepted = inspect.signature(cls).parameters
    components: dict[str, Any] = {**index.settings, **dict.fromkeys(OURS)}
    if scheduler is not None:
        components["scheduler"] = scheduler
    entries = {name: entry for name, entry in index.components.items() if name not in components}
    needed = [name for name, parameter in accepted.items() if parameter.default is parameter.empty]
    for name in needed:
        if name not in OURS and (components | entries).get(name) is None:
            raise RunError(f"{folder / 'model_index.json'}: {name} is missing, and {cls.__name__} needs it")
    sizes = {name: count_weight_bytes(folder, name, entry) for name, entry in entries.items()}
    tally.expect(sum(sizes.values()))
    for name, entry in entries.items():
        kind = vae_dtype if name == "vae" else dtype
        components[name] = load_component(folder, name, entry, device=place(name), dtype=kind, add=tally.add)
    with translate_load_errors(folder / "model_index.json"):
        pipeline = cls(**{name: value for name, value in components.items() if name in accepted})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_module(cls: type, folder: Path, name: str, dtype: torch.dtype) -> torch.nn.Module:
    """Load one component of the checkpoint in `folder`, saved by the pipeline class `cls`, onto the host."""
    return load_component(folder, name, read_model_index(folder, cls).components[name], device=HOST, dtype=dtype)


class ModelIndex(NamedTuple):
    """The content of a model_index.json: `{component: (library, class)}`, and the pipeline's own settings."""

    components: dict[str, tuple[str, str]]
    settings: dict[str, Any]


def read_model_index(folder: Path, cls: type) -> ModelIndex:
    """Read the index of a checkpoint. Raises `UsageError` unless the pipeline class `cls` saved it."""
    path = folder / "model_index.json"
    content = read_checkpoint_json(path)
    saved_by = content.get("_class_name")
    pairs = {key: tuple(value) for key, value in content.items() if isinstance(value, list) and len(value) == 2}
    if not isinstance(saved_by, str):
        raise RunError(f"{path}: not the index of a diffusers pipeline")
    check_index(path, content)
    if saved_by != cls.__name__:
        transformer = read_json(folder / "transformer" / "config.json")
        raise UsageError(f"{path}: {cls.__name__} does not run {describe_mismatch(content, transformer)}")
    settings = {key: value for key, value in content.items() if key not in pairs and not key.startswith("_")}
    return ModelIndex(find_components(pairs), settings)


def check_index(path: Path, index: Mapping[str, Any]) -> None:
    """Raise `RunError` for a pair in a model_index.json that does not name a library and a class, or null for both.

    Also for a component whose name is no identifier: it is the name of a folder, and could lead out of the checkpoint.
    """
    for name, one in index.items():
        if isinstance(one, list) and not name.isidentifier():
            raise RunError(f"{path}: {name[:100]!r} is not the name of a component")
        if isinstance(one, list) and len(one) == 2 and one[0] is not None and not all(isinstance(x, str) for x in one):
            raise RunError(f"{path}: {name}: {str(one)[:100]} does not name a library and a class")


def find_components(index: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Return `{component: (library, class)}` of a model_index.json; its other entries are settings."""
    pairs = {name: tuple(one) for name, one in index.items() if isinstance(one, (list, tuple)) and len(one) == 2}
    return {name: (resolve_library(library), cls) for name, (library, cls) in pairs.items() if library}


def resolve_library(name: Any) -> Any:
    """Return the library's name. Classes from a pipeline's own module, listed under its name, count as diffusers'."""
    own = isinstance(name, str) and name.isidentifier() and name not in LIBRARIES
    return "diffusers" if own and importlib.util.find_spec(f"diffusers.pipelines.{name}") else name


def count_weight_bytes(folder: Path, name: str, entry: tuple[str, str]) -> int:
    """Return the bytes of the component's weights; 0 if it has none."""
    has = issubclass(require_class(folder, name, entry), torch.nn.Module)
    return Checkpoint(folder / name, STEMS[entry[0]]).size if has else 0


def load_component(
    folder: Path,
    name: str,
    entry: tuple[str, str],
    *,
    device: torch.device,
    dtype: torch.dtype,
    add: Callable[[int], None] = lambda _: None,
) -> Any:
    """Load one component by its library's own `from_pretrained`, safetensors only; `add` gets the bytes read.

    Text encoders are loaded straight onto their device. The VAE, which is small, is loaded onto the host first: this
    way diffusers reports the name of a missing tensor.
    """
    library = entry[0]
    cls = require_class(folder, name, entry)
    if not issubclass(cls, torch.nn.Module):
        with translate_load_errors(folder / name), quiet_libraries():
            return load_processor(cls, folder / name) if is_processor(cls) else cls.from_pretrained(folder / name)
    checkpoint = Checkpoint(folder / name, STEMS[library])
    with quiet_libraries():
        check_component_fit(cls, folder / name, checkpoint)
    shown = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # reported by name in refuse_incomplete
    with translate_load_errors(folder / name), quiet_libraries():
        if library == "transformers":
            config = cls.config_class.from_pretrained(folder / name)
            weights = make_lazy_state_dict(checkpoint, dtype, add)
            module, info = cls.from_pretrained(
                None, config=config, state_dict=weights, dtype=dtype, device_map={"": device}, **shown
            )
        else:
            module, info = cls.from_pretrained(folder / name, use_safetensors=True, torch_dtype=dtype, **shown)
            add(checkpoint.size)
    refuse_incomplete(folder / name, info)
    if (folder / name / GENERATION).is_file():  # sampling settings, not in config.json
        module.generation_config = read_generation_config(folder / name)
    move_module(module.eval().requires_grad_(False), device)
    return module


def check_component_fit(cls: Any, folder: Path, checkpoint: Checkpoint) -> None:
    """Raise `RunError` for damaged files, or a config that asks for another size of model than the weights have.

    The libraries would build it first: from a wrong config, without end.
    """
    where = str(folder / "config.json")
    config = read_checkpoint_json(folder / "config.json", INFINITE)
    check_counts(where, config, len(checkpoint.headers))
    module = build_on_meta(where, lambda: make_module(cls, config), limit_parameter_count(checkpoint))
    check_module_fit(where, module, checkpoint)


def make_module(cls: Any, config: dict[str, Any]) -> torch.nn.Module:
    """Build a module of diffusers or transformers from the content of its config.json."""
    theirs = issubclass(cls, torch.nn.Module) and hasattr(cls, "config_class")  # transformers'
    return cls(cls.config_class.from_dict(config)) if theirs else cls.from_config(config)


def read_generation_config(folder: Path) -> Any:
    """Read the settings by which the model in `folder` samples tokens."""
    from transformers import GenerationConfig

    with translate_load_errors(folder), quiet_libraries():
        return GenerationConfig.from_pretrained(folder, local_files_only=True)


def require_class(folder: Path, name: str, entry: tuple[str, str]) -> Any:
    """Return the component's class. Raises `RunError` for a class that must not be loaded."""
    library, class_name = entry
    if library not in LIBRARIES:
        raise RunError(f"{folder / 'model_index.json'}: {name} comes from {library!r}; only {LIBRARIES} are loaded")
    cls = find_component_class(library, class_name)
    if cls is None:
        raise RunError(f"{folder / 'model_index.json'}: {name}: the installed {library} has no component {class_name}")
    return cls


def find_component_class(library: str, name: str) -> Any:
    """Return the class, or None if it is not of these kinds: other classes' `from_pretrained` may read pickles."""
    import diffusers
    import transformers

    try:
        found = getattr(importlib.import_module(library), name, None)
    except (ImportError, RuntimeError) as error:  # transformers imports a class's module here
        raise RunError(f"{library} cannot import {name}: {describe_import_error(error)}") from error
    kinds = (
        diffusers.ModelMixin,
        diffusers.SchedulerMixin,
        transformers.PreTrainedModel,
        transformers.PreTrainedTokenizerBase,
        transformers.ProcessorMixin,
        transformers.ImageProcessingMixin,
        transformers.FeatureExtractionMixin,
    )
    return found if isinstance(found, type) and issubclass(found, kinds) else None


def is_processor(cls: type) -> bool:
    """Return whether the class combines a tokenizer and an image processor."""
    import transformers

    return issubclass(cls, transformers.ProcessorMixin)


def refuse_incomplete(folder: Path, info: dict[str, Any]) -> None:
    """Raise `RunError` for tensors that do not match. The libraries would fill missing ones with random numbers."""
    for kind, problem in (
        ("missing_keys", "is missing"),
        ("mismatched_keys", "has another shape than config.json asks for"),
        ("error_msgs", "cannot be loaded"),
        ("unexpected_keys", "has no place in this model"),
    ):
        names = sorted(str(key[0] if isinstance(key, tuple) else key) for key in info.get(kind) or ())
        if names:
            raise RunError(f"{folder}: {names[0]!r} {problem} ({len(names)} such tensors)")


@contextmanager
def translate_load_errors(folder: Path) -> Iterator[None]:
    """Turn a library's error about a checkpoint into a one-line `RunError` that names the folder."""
    try:
        yield
    except (RunError, UsageError, MemoryError, torch.OutOfMemoryError):  # not the checkpoint's fault, or said already
        raise
    except Exception as error:  # libraries raise nearly anything for a damaged file
        if is_host_memory_error(error):
            raise
        raise RunError(f"{folder}: cannot be loaded: {describe_import_error(error)}") from error


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence the libraries' progress bars and warnings: what they warn about is an error here."""
    import diffusers
    import transformers

    bars = (diffusers.utils.logging, transformers.utils.logging)
    levels = [library.get_verbosity() for library in bars]
    loggers = [logging.getLogger(name) for name in TORCHAO_LOGGERS]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    for library in bars:
        library.disable_progress_bar()
        library.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # about torch functions that they call
            yield
    finally:
        for library, level in zip(bars, levels, strict=True):
            library.set_verbosity(level)
            library.enable_progress_bar()
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
