"""The fixed sections of a configuration as dataclasses, which refuse unknown keys and wrong types.

The options in `conf/` fill them. The comment above each YAML field explains it, with its unit and range.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from dataclasses import dataclass, field
from typing import Any, Optional

MISSING: Any = "???"  # OmegaConf's marker, written out: ranks import this module, but neither Hydra nor OmegaConf


#: sections whose keys depend on the chosen class: set without Hydra's `+`, and checked once the class is known
OPEN = ("scheduler",)


@dataclass
class Model:
    """The checkpoint, and the parts (`_target_` nodes) of its pipeline."""

    name: str = MISSING
    task: str = MISSING
    path: str = MISSING
    revision: Optional[str] = None  # noqa: UP045 - OmegaConf on Python 3.10 reads Optional, not `X | None`
    pipeline: dict[str, Any] = MISSING
    transformer: dict[str, Any] = MISSING
    patch_size: int = 2
    experts: int = 1
    scheduler: Any = None  # a node or null, read from files of version 0.1.0; replaced by the group `scheduler`
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
    """TeaCache's polynomials by expert, highest power first, and the conditions of the fit; null: unknown."""

    model: str = MISSING
    coefficients: dict[str, list[float]] = MISSING
    revision: Optional[str] = None  # noqa: UP045
    weights: Optional[str] = None  # noqa: UP045 - their fingerprint
    scheduler: Optional[str] = None  # noqa: UP045
    num_inference_steps: Optional[list[int]] = None  # noqa: UP045 - least and most
    source: Optional[str] = None  # noqa: UP045


@dataclass
class Sampling:
    """What to draw. Names and meanings are those of diffusers. Fields that a model does not take are null."""

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
    """Input images, and the file of prompts."""

    images: Any = None
    prompts: Any = None


@dataclass
class Parallel:
    """Ranks per parallel method. `core.distributed.degrees.world_size` gives the total number of ranks.

    `max_ranks`: the limit on that number; null: `core.distributed.limits.max_ranks`. Set only on the command line.
    """

    data_degree: int = 1
    cfg_degree: int = 1
    ring_degree: int = 1
    ulysses_degree: int = 1
    tensor_degree: int = 1
    hsdp_degree: int = 1
    vae_degree: int = 1
    max_ranks: Optional[int] = None  # noqa: UP045


@dataclass
class Vae:
    """Settings of the VAE."""

    dtype: Optional[str] = None  # noqa: UP045
    slicing: bool = False
    tiling: bool = False
    channels_last: bool = False


@dataclass
class Output:
    """Format of the output files, and whether they contain metadata."""

    format: str = "png"
    fps: Optional[int] = None  # noqa: UP045
    metadata: bool = True


@dataclass
class Report:
    """Quality measures, noise floor, and objectives of a search."""

    metrics: list[str] = field(default_factory=list)
    noise_floor: list[str] = field(default_factory=list)
    objectives: list[str] = field(default_factory=list)
    twins: str = "outputs/twins"


@dataclass
class Plan:
    """Whether to choose settings that fit, and the device to plan for."""

    auto: bool = False
    device: Optional[str] = None  # noqa: UP045


@dataclass
class Config:
    """The whole configuration.

    `cache`, `attention`, `compile`, `quantization` and `offload` are `_target_` nodes, checked against the signature of
    their class. `scheduler` may lack `_target_`: then the class is the checkpoint's.
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
    strict_prompt: bool = False


def fill_defaults(config: Any, section: type = Config) -> Any:
    """Fill a configuration that an older version wrote with the defaults of newer fields, in place; return it."""
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


@functools.cache
def register_schema() -> None:
    """Register the schema with Hydra, once per process, under the name that `conf/config.yaml` lists first."""
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    node = OmegaConf.structured(Config)
    for section in OPEN:
        OmegaConf.set_struct(node[section], False)
    ConfigStore.instance().store("schema", node)
