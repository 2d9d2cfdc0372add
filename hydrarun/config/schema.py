"""The fixed sections of a configuration as dataclasses: they refuse unknown keys and wrong types.

The options in `conf/` fill them; the comment above each YAML field says what it is, its unit and range.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from typing import Any, Optional

MISSING: Any = "???"  # as OmegaConf writes it: ranks read this module, and they import neither Hydra nor OmegaConf


#: sections whose keys the chosen class decides: they are set without Hydra's `+`, and checked where the class is known
OPEN = ("scheduler",)


@dataclass
class Model:
    """Which checkpoint, and the parts (`_target_` nodes) that turn it into a pipeline."""

    name: str = MISSING
    task: str = MISSING
    path: str = MISSING
    revision: Optional[str] = None  # noqa: UP045 - OmegaConf on Python 3.10 reads Optional, not `X | None`
    pipeline: dict[str, Any] = MISSING
    transformer: dict[str, Any] = MISSING
    patch_size: int = 2
    experts: int = 1
    scheduler: Any = None  # a node or null; as files of version 0.1.0 have it: now the group `scheduler`
    guidance: dict[str, Any] = MISSING
    stages: list[dict[str, Any]] = MISSING
    takes: list[str] = MISSING
    limits: dict[str, Any] = field(default_factory=dict)
    input_images: list[int] = field(default_factory=lambda: [0, 0])
    teacache: Any = None  # a mapping or null
    judge: Optional[str] = None  # noqa: UP045
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass
class TeaCacheFit:
    """TeaCache's polynomials, highest power first, by expert, and what they were fitted on; null: was not told."""

    model: str = MISSING
    coefficients: dict[str, list[float]] = MISSING
    revision: Optional[str] = None  # noqa: UP045
    weights: Optional[str] = None  # noqa: UP045 - their fingerprint
    scheduler: Optional[str] = None  # noqa: UP045
    num_inference_steps: Optional[list[int]] = None  # noqa: UP045 - least and most
    source: Optional[str] = None  # noqa: UP045


@dataclass
class Sampling:
    """What to draw. Names and meanings are diffusers'; null where a model does not take a field."""

    prompt: Any = MISSING
    negative_prompt: Any = None
    num_inference_steps: int = 50
    true_cfg_scale: Optional[float] = None  # noqa: UP045
    guidance_scale: Optional[float] = None  # noqa: UP045
    guidance_scale_2: Optional[float] = None  # noqa: UP045
    height: Optional[int] = None  # noqa: UP045
    width: Optional[int] = None  # noqa: UP045
    num_frames: Optional[int] = None  # noqa: UP045
    layers: Optional[int] = None  # noqa: UP045
    resolution: Optional[int] = None  # noqa: UP045
    seed: Any = 0
    num_images_per_prompt: Optional[int] = None  # noqa: UP045
    max_sequence_length: Optional[int] = None  # noqa: UP045
    audio_start_in_s: Optional[float] = None  # noqa: UP045
    audio_end_in_s: Optional[float] = None  # noqa: UP045


@dataclass
class Input:
    """What is given beside the prompt."""

    images: Any = None
    prompts: Any = None


@dataclass
class Parallel:
    """Ranks for each method; their product, or what HSDP or the VAE ask for, is the number of ranks."""

    data_degree: int = 1
    cfg_degree: int = 1
    ring_degree: int = 1
    ulysses_degree: int = 1
    tensor_degree: int = 1
    hsdp_degree: int = 1
    vae_degree: int = 1


@dataclass
class Vae:
    """How the VAE decodes."""

    dtype: Optional[str] = None  # noqa: UP045
    slicing: bool = False
    tiling: bool = False
    channels_last: bool = False


@dataclass
class Output:
    """What files are written, and what is written beside the pixels."""

    format: str = "png"
    fps: Optional[int] = None  # noqa: UP045
    metadata: bool = True


@dataclass
class Report:
    """What is measured beside drawing."""

    metrics: list[str] = field(default_factory=list)
    noise_floor: list[str] = field(default_factory=list)
    objectives: list[str] = field(default_factory=list)
    twins: str = "outputs/twins"


@dataclass
class Plan:
    """Whether settings are chosen so that a run fits, and into what."""

    auto: bool = False
    device: Optional[str] = None  # noqa: UP045


@dataclass
class Config:
    """The whole configuration.

    `cache`, `attention`, `compile`, `quantization`, `offload` are `_target_` nodes, checked against their callee;
    `scheduler` is one that may lack the `_target_`, which is then the checkpoint's.
    """

    model: Model = field(default_factory=Model)
    scheduler: dict[str, Any] = field(default_factory=dict)
    sampling: Sampling = field(default_factory=Sampling)
    input: Input = field(default_factory=Input)
    parallel: Parallel = field(default_factory=Parallel)
    cache: dict[str, Any] = MISSING
    attention: dict[str, Any] = MISSING
    compile: dict[str, Any] = MISSING
    quantization: dict[str, Any] = MISSING
    offload: dict[str, Any] = MISSING
    plan: Plan = field(default_factory=Plan)
    vae: Vae = field(default_factory=Vae)
    output: Output = field(default_factory=Output)
    report: Report = field(default_factory=Report)
    batch_size: Optional[int] = None  # noqa: UP045
    retry: int = 0
    fail_fast: bool = False
    warmup: int = 0
    device: str = "auto"
    dtype: str = "auto"
    verify: bool = False


def fill_defaults(config: Any, section: type = Config) -> Any:
    """A configuration that an older version wrote, with the defaults of the fields that it did not know."""
    if not isinstance(config, dict):
        return config
    hints = typing.get_type_hints(section)
    for one in dataclasses.fields(section):
        default: Any = one.default if one.default_factory is dataclasses.MISSING else one.default_factory()
        if one.name not in config and default != MISSING:
            config[one.name] = default if not dataclasses.is_dataclass(default) else dataclasses.asdict(default)  # type: ignore[arg-type]
        elif dataclasses.is_dataclass(hints[one.name]):
            config[one.name] = fill_defaults(config.get(one.name), hints[one.name])
    return config


def register_schema() -> None:
    """Make the schema known to Hydra under the name that `conf/config.yaml` lists first."""
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    node = OmegaConf.structured(Config)
    for section in OPEN:
        OmegaConf.set_struct(node[section], False)
    ConfigStore.instance().store("schema", node)
