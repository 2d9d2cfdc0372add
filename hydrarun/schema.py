"""The fixed sections of a configuration as dataclasses: they refuse unknown keys and wrong types.

The options in `conf/` fill them; the comment above each YAML field says what it is, its unit and range.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING


@dataclass
class Model:
    """Which checkpoint, and the parts (`_target_` nodes) that turn it into a pipeline."""

    name: str = MISSING
    task: str = MISSING
    path: str = MISSING
    revision: Optional[str] = None  # noqa: UP045 - OmegaConf on Python 3.10 reads Optional, not `X | None`
    pipeline: dict[str, Any] = MISSING
    transformer: dict[str, Any] = MISSING
    scheduler: Any = None  # a node or null: OmegaConf cannot merge a node into a null of type dict
    guidance: dict[str, Any] = MISSING
    stages: list[dict[str, Any]] = MISSING
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass
class Sampling:
    """What to draw. Names and meanings are diffusers'."""

    prompt: Any = MISSING
    negative_prompt: Any = None
    num_inference_steps: int = 50
    true_cfg_scale: float = 1.0
    guidance_scale: Optional[float] = None  # noqa: UP045
    height: int = MISSING
    width: int = MISSING
    seed: Any = 0
    num_images_per_prompt: Optional[int] = None  # noqa: UP045
    max_sequence_length: int = 512


@dataclass
class Vae:
    """How the VAE decodes."""

    slicing: bool = False
    tiling: bool = False


@dataclass
class Output:
    """What is written beside the pixels."""

    metadata: bool = True


@dataclass
class Config:
    """The whole configuration; `attention` and `compile` are `_target_` nodes, checked against their callee."""

    model: Model = field(default_factory=Model)
    sampling: Sampling = field(default_factory=Sampling)
    attention: dict[str, Any] = MISSING
    compile: dict[str, Any] = MISSING
    vae: Vae = field(default_factory=Vae)
    output: Output = field(default_factory=Output)
    device: str = "auto"
    dtype: str = "auto"


def register() -> None:
    """Make the schema known to Hydra under the name that `conf/config.yaml` lists first."""
    ConfigStore.instance().store("schema", Config)
