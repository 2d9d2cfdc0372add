"""What a configuration may build: an allow-list of exact classes, and the building itself.

A `_target_` is code chosen by data, and recipes and pictures carry data from strangers. So every target must be one of
`ALLOWED` (exact names, no prefixes: a prefix such as `torch.` admits `torch.load`), or a class that the user allowed
by `--allow-target`. Hydra 1.3 has only a block-list, which is no boundary; its `instantiate` is not used here.
"""

from __future__ import annotations

import importlib
import inspect
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from hydrarun.config.type_check import describe, fits, show
from hydrarun.core.errors import UsageError, nearest

ALLOWED = frozenset(
    {
        "hydrarun.models.qwen_image.QwenImageTransformer",
        "hydrarun.models.flux.FluxTransformer",
        "hydrarun.models.sd3.SD3Transformer",
        "hydrarun.pipeline.stages.longcat_image.LongCatImagePipeline",
        "hydrarun.pipeline.stages.longcat_image.LongCatImageEditPipeline",
        "hydrarun.models.longcat_image.LongCatImageTransformer",
        "hydrarun.pipeline.stages.longcat_image.EncodePromptWithImages",
        "hydrarun.models.ovis_image.OvisImageTransformer",
        "hydrarun.models.glm_image.GlmImageTransformer",
        "hydrarun.pipeline.stages.glm_image.FitImages",
        "hydrarun.pipeline.stages.glm_image.EncodePromptAndDrawPrior",
        "hydrarun.pipeline.stages.glm_image.EncodeFittedImages",
        "hydrarun.pipeline.stages.glm_image.PrepareTimesteps",
        "hydrarun.models.wan.WanTransformer",
        "hydrarun.pipeline.stages.wan.EncodeFirstFrame",
        "hydrarun.pipeline.stages.wan.EncodeFirstFrameAsChannels",
        "hydrarun.pipeline.stages.wan.KeepFirstFrame",
        "hydrarun.models.zimage.ZImageTransformer",
        "hydrarun.pipeline.stages.stable_audio.StableAudioPipeline",
        "hydrarun.models.stable_audio.StableAudioTransformer",
        "hydrarun.pipeline.stages.stable_audio.EncodePromptAndSeconds",
        "hydrarun.pipeline.guidance.ClassifierFreeGuidance",
        "hydrarun.pipeline.guidance.SkipLayerGuidance",
        "hydrarun.pipeline.stages.validate.ValidateInput",
        "hydrarun.pipeline.stages.images.SizeFromImage",
        "hydrarun.pipeline.stages.images.EncodeImages",
        "hydrarun.pipeline.stages.encode.EncodePrompt",
        "hydrarun.pipeline.stages.encode.EncodeRaggedPrompt",
        "hydrarun.pipeline.stages.encode.EncodePromptWithImages",
        "hydrarun.pipeline.stages.encode.EmbedGuidance",
        "hydrarun.pipeline.stages.caption.EncodePromptOrCaption",
        "hydrarun.pipeline.stages.latents.PrepareLatents",
        "hydrarun.pipeline.stages.layers.PrepareLayers",
        "hydrarun.pipeline.stages.layers.DecodeLayers",
        "hydrarun.pipeline.stages.timesteps.PrepareTimesteps",
        "hydrarun.pipeline.stages.denoise.Denoise",
        "hydrarun.pipeline.stages.decode.DecodeLatents",
        "hydrarun.pipeline.stages.sound.PrepareSoundLatents",
        "hydrarun.pipeline.stages.sound.DecodeSound",
        "hydrarun.models.layers.attention_backends.SDPA",
        "hydrarun.models.layers.attention_backends.FlashAttention",
        "hydrarun.models.layers.attention_backends.CuDNNAttention",
        "hydrarun.models.layers.attention_backends.FlexAttention",
        "hydrarun.models.layers.attention_backends.SageAttention",
        "hydrarun.acceleration.cache.base.NoCache",
        "hydrarun.acceleration.cache.step_cache.StepCache",
        "hydrarun.acceleration.cache.cache_dit.CacheDiT",
        "hydrarun.acceleration.cache.adaptive_gates.TeaCache",
        "hydrarun.acceleration.cache.adaptive_gates.FirstBlock",
        "hydrarun.acceleration.cache.gates.EveryN",
        "hydrarun.acceleration.cache.gates.Mask",
        "hydrarun.acceleration.cache.predictors.Reuse",
        "hydrarun.acceleration.cache.predictors.Taylor",
        "hydrarun.acceleration.compilation.NoCompile",
        "hydrarun.acceleration.compilation.CompileBlocks",
        "hydrarun.acceleration.compilation.CompileFull",
        "hydrarun.acceleration.quantization.NoQuantization",
        "hydrarun.acceleration.quantization.TorchAO",
        "hydrarun.acceleration.offload.strategies.NoOffload",
        "hydrarun.acceleration.offload.strategies.ExpertOffload",
        "hydrarun.acceleration.offload.modulation_tables.ModulationOffload",
        "hydrarun.acceleration.offload.strategies.ModelOffload",
        "hydrarun.acceleration.offload.strategies.LayerwiseOffload",
        "hydrarun.acceleration.offload.strategies.DiskOffload",
        "hydrarun.acceleration.offload.strategies.TextEncoderOffload",
        "diffusers.QwenImagePipeline",
        "diffusers.QwenImageEditPipeline",
        "diffusers.QwenImageEditPlusPipeline",
        "diffusers.QwenImageLayeredPipeline",
        "diffusers.FluxPipeline",
        "diffusers.StableDiffusion3Pipeline",
        "diffusers.OvisImagePipeline",
        "diffusers.GlmImagePipeline",
        "diffusers.WanPipeline",
        "diffusers.WanImageToVideoPipeline",
        "diffusers.ZImagePipeline",
        "diffusers.FlowMatchEulerDiscreteScheduler",
        "diffusers.FlowMatchHeunDiscreteScheduler",
        "diffusers.FlowMatchLCMScheduler",
        "diffusers.UniPCMultistepScheduler",
        "diffusers.DPMSolverMultistepScheduler",
        "diffusers.CosineDPMSolverMultistepScheduler",
        "diffusers.DEISMultistepScheduler",
        "diffusers.SASolverScheduler",
    }
)

# Arguments that make an allowed class run code from a checkpoint's repository.
FORBIDDEN_ARGUMENTS = frozenset({"trust_remote_code", "custom_pipeline", "custom_revision"})

_allowed_by_user: set[str] = set()


def allowed_by_user() -> list[str]:
    """The classes that the user allowed, for ranks that are to allow them too."""
    return sorted(_allowed_by_user)


def allow(name: str) -> None:
    """Let the class with this dotted name be built too. Only the user's own command line or code may call this."""
    if not all(part.isidentifier() for part in name.split(".")) or "." not in name:
        raise UsageError(f"--allow-target {name}: not the dotted name of a class, such as my.module.Class.")
    _allowed_by_user.add(name)


def check(config: Mapping[str, Any], origin: Callable[[str], str] | None = None) -> None:
    """Refuse every target that is not allowed, and every other `_key_`, in a plain resolved configuration.

    Imports nothing. `origin` tells where a key's value came from. Raises UsageError with one line for each violation.
    """
    if problems := list(_problems(config, "")):
        raise UsageError("\n".join(f"{key}{f' ({origin(key)})' if origin else ''}: {text}" for key, text in problems))


def load_class(node: Mapping[str, Any], where: str = "") -> type:
    """The class that `node["_target_"]` names, imported and verified to be that very class; not called.

    `where` is the node's key path, for messages. Raises UsageError.
    """
    name: Any = node.get("_target_")
    for key, text in _target_problem(name, f"{where}._target_".lstrip(".")):
        raise UsageError(f"{key}: {text}")
    where = where or name
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        if name in ALLOWED and module.startswith("hydrarun."):
            raise  # our own module does not load: a bug, not a mistake of the user
        raise UsageError(f"{where}: cannot load {name}: {error}") from error
    package = module.partition(".")[0]
    if not isinstance(found, type) or found.__name__ != attribute or found.__module__.partition(".")[0] != package:
        raise UsageError(f"{where}: {name} is not a class of the package '{package}' but {found!r}.")
    return found


def instantiate(node: Mapping[str, Any], where: str = "", /, **extra: Any) -> Any:
    """Build the class that `node` names from the node's other keys and `extra`, what the caller adds to them.

    The callee's signature is the schema: unknown and missing arguments and simple types (bool, int, float, str, None,
    Literal and unions of them) are checked before the call. `where` is the node's key path, for messages. Nested
    nodes are passed as they are. Raises UsageError.
    """
    cls = load_class(node, where)
    where = where or cls.__name__
    given = {key: value for key, value in node.items() if key != "_target_"}
    parameters = {name: p for name, p in inspect.signature(cls).parameters.items() if name != "self"}
    named = {name for name, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    settable = sorted(named - extra.keys())
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for key in given:
        if key in extra or (key not in named and not open_ended):
            names = ", ".join(settable) or "none"
            raise UsageError(
                f"{where}.{key}: {cls.__name__} takes no such argument.{nearest(key, settable)} It takes: {names}."
            )
    required = [name for name in settable if parameters[name].default is inspect.Parameter.empty]
    if missing := [name for name in required if name not in given]:
        raise UsageError(f"{where}: {cls.__name__} needs {', '.join(missing)}; set {where}.{missing[0]}=…")
    hints = _hints(cls)
    for key, value in given.items():
        if key in hints and not fits(value, hints[key]):
            raise UsageError(f"{where}.{key}: {show(value)} is not {describe(hints[key])}.")
    return cls(**given, **extra)


def _problems(node: Any, path: str) -> Iterator[tuple[str, str]]:
    """Key paths, and what is wrong there."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            here = f"{path}.{key}" if path else str(key)
            if key == "_target_":
                yield from _target_problem(value, here)
            elif str(key).startswith("_"):
                yield here, "keys with a leading underscore other than _target_ are not allowed."
            elif key in FORBIDDEN_ARGUMENTS:
                yield here, "not allowed: it would run code that comes with a checkpoint."
            else:
                yield from _problems(value, here)
    elif isinstance(node, (list, tuple)):
        for index, value in enumerate(node):
            yield from _problems(value, f"{path}[{index}]")


def _target_problem(name: Any, path: str) -> Iterator[tuple[str, str]]:
    allowed = ALLOWED | _allowed_by_user
    if not isinstance(name, str) or name not in allowed:
        hint = nearest(str(name), allowed) or " For a class of your own: --allow-target my.module.Class"
        yield path, f"{name!r} is not on the list of allowed classes.{hint}"


def _hints(cls: type) -> dict[str, Any]:
    try:
        return typing.get_type_hints(cls.__init__)  # type: ignore[misc]
    except NameError:  # annotations that exist for the type checker only: nothing to compare with
        return {}
