"""Every model option with a tiny checkpoint of its own: what tests that must hold for all models run over.

A new model joins by a builder in `checkpoints.BUILDERS`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from hydrarun.config.checks.checkpoint import find_size_multiple, read_vae_factors
from hydrarun.config.checks.values import find_cfg_scale, get_unguided_scale, is_video
from hydrarun.config.compose import compose_config, compose_unchecked
from hydrarun.core import resources
from hydrarun.engine.runner import Runner
from hydrarun.outputs.media import kinds
from tests.helpers import checkpoints, tiny

MODELS = sorted(file.stem for file in (resources.find_folder("conf") / "model").glob("*.yaml"))


class Configs(dict[str, dict[str, Any]]):
    """The configuration of each model as it is, composed when it is asked for."""

    def __missing__(self, name: str) -> dict[str, Any]:
        self[name] = compose_unchecked([f"model={name}"])[0]
        return self[name]


CONFIGS = Configs()

#: keys of `model` that may differ between options that run the same code
DATA = ("name", "path", "revision", "takes", "limits", "teacache", "facts")


def structure(name: str) -> dict[str, Any]:
    """The keys of a model option that decide which code runs."""
    return {key: value for key, value in CONFIGS[name]["model"].items() if key not in DATA}


def base(name: str) -> str | None:
    """The option that this one inherits from and differs from in data alone, if there is one."""
    node = yaml.safe_load((resources.find_folder("conf") / "model" / f"{name}.yaml").read_text(encoding="utf-8"))
    parent = (node.get("defaults") or [None])[0]
    return parent if parent in MODELS and structure(parent) == structure(name) else None


#: options that differ from another in data alone, with that other
VARIANTS = {name: parent for name in MODELS if (parent := base(name))}

#: the others
FAMILIES = [name for name in MODELS if name not in VARIANTS]


def with_variants(*values: Any) -> list[Any]:
    """Parameters of a test, of which those of a variant run in `make test-all` alone."""
    names = [value[0] if isinstance(value, tuple) else value for value in values]
    full = pytest.mark.full
    return [
        pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=full if name in VARIANTS else ())
        for name, value in zip(names, values, strict=True)
    ]

#: one of each sort of transformer, for what is the same code for all of them and takes long
SORTS = ("qwen_image_edit_plus", "flux_dev", "wan22_t2v_a14b", "zimage", "stable_audio")

#: the file for `input.images`, beside a subject's folder
IMAGE = "input.png"

#: a level of 255 for pictures, 1/1024 of all that there can be for sounds
TOLERANCE = {np.dtype(np.uint8): 1, np.dtype(np.int16): 64}

SHORT, LONG = "a cat", "two dogs, one of them “asleep”, on a 红色 sofa (wide shot)"


@dataclass
class Subject:
    """One model option: diffusers' pipeline, the folder that it was saved in, and our runner on that folder."""

    name: str
    pipeline: Any
    folder: Path
    runner: Runner

    @property
    def multiple(self) -> int:
        """Pixels that height and width must be a multiple of."""
        return multiple(self.folder)

    def size(self, rows: int, columns: int) -> dict[str, int]:
        """The fields of `sampling` that ask for so many multiples; a sound has no size."""
        return sized(self.name, self.folder, rows, columns)

    def overrides(self) -> list[str]:
        """The command line of a small run."""
        return command(self.name, self.folder)

    def draw(
        self,
        images: int | None = None,
        size: tuple[int, int] | None = None,
        cache: dict[str, Any] | None = None,
        **sampling: Any,
    ) -> Any:
        """The finished state; `images`: how many are given (as many as must be), `size`: in multiples."""
        if size:
            sampling |= self.size(*size)
        least = CONFIGS[self.name]["model"]["input_images"][0]
        given = pictures(least if images is None else images, CONFIGS[self.name])
        return tiny.draw(self.runner, given, cache, **sampling)


def command(name: str, folder: Path) -> list[str]:
    """The command line of a small run of a saved subject."""
    size = [f"sampling.{key}={value}" for key, value in sized(name, folder, 4, 4).items()]
    plain = [
        word for word in tiny.overrides(folder, name) if not word.startswith(("sampling.height", "sampling.width"))
    ]
    frames = ["sampling.num_frames=5"] if is_video(CONFIGS[name]) else []
    image = [f"input.images={folder.parent / IMAGE}"] if CONFIGS[name]["model"]["input_images"][0] else []
    return [*plain, *size, *frames, *image]


def sized(name: str, folder: Path, rows: int, columns: int) -> dict[str, int]:
    """As `Subject.size`."""
    if kinds.find_model_kind(CONFIGS[name]["model"]) is kinds.SOUND:
        return {}
    return {"height": rows * multiple(folder), "width": columns * multiple(folder)}


def multiple(folder: Path) -> int:
    """Pixels that height and width of a saved subject must be a multiple of."""
    vae, transformer = (json.loads((folder / name / "config.json").read_text()) for name in ("vae", "transformer"))
    return find_size_multiple(read_vae_factors(vae)[1], transformer, patch=2)


def pictures(count: int, config: dict[str, Any] | None = None) -> list[Image.Image]:
    """Input images of unequal sizes and proportions; with alpha, if the model of `config` takes it."""
    generator = np.random.default_rng(0)
    channels = 4 if config and kinds.find_model_kind(config["model"]).alpha else 3
    sizes = [(64, 100), (100, 64), (64, 64)]  # at a megapixel, multiples of 64: what the tiny VAE needs
    values = [generator.integers(0, 256, (*size, channels), dtype=np.uint8) for size in sizes[:count]]
    return [Image.fromarray(one) for one in values]


def build(name: str, folder: Path) -> Subject:
    """The subject of that name, saved in `folder`."""
    pictures(1, CONFIGS[name])[0].save(folder / IMAGE)
    pipeline = checkpoints.BUILDERS[name]()
    pipeline.save_pretrained(folder / name)
    subject = Subject(name, pipeline, folder / name, None)
    subject.runner = Runner(compose_config(subject.overrides()))
    for vae in (pipeline.vae, subject.runner.built.parts.pipeline.vae):
        vae.encode = remembering(vae.encode)
    return subject


def remembering(encode: Callable[..., Any], seen: dict[bytes, Any] | None = None) -> Callable[..., Any]:
    """The same function, which computes each input once: a megapixel takes a second, and all cases have the same."""
    seen = {} if seen is None else seen

    def encode_once(pixels: torch.Tensor) -> Any:
        key = hashlib.sha256(pixels.numpy().tobytes()).digest()
        if key not in seen:
            seen[key] = encode(pixels)
        return seen[key]

    return encode_once


def apart(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference of what was drawn, in what it may be."""
    assert ours.dtype == theirs.dtype
    return np.abs(ours.astype(int) - theirs.astype(int)).max() / TOLERANCE[ours.dtype]


def cases(name: str) -> dict[str, dict[str, Any]]:
    """What a model is asked for in a test of its numbers, from what its option says that it takes."""
    config = CONFIGS[name]
    takes, (least, most) = config["model"]["takes"], config["model"]["input_images"]
    scale, off = find_cfg_scale(config)[0], get_unguided_scale(config)
    guided = {scale: 3.0, "negative_prompt": LONG}
    found = {
        "guided": guided,
        **{f"guidance off at {value:g}": {scale: value} for value in sorted({0.0, off})},
        "unequal prompts": {"prompt": [SHORT, LONG], "seed": [3, 4], **guided, "negative_prompt": ["x", LONG]},
        "unequal prompts, guidance off": {"prompt": [LONG, SHORT], "seed": [3, 4], scale: off},
        "more steps": {"num_inference_steps": 7},
    }
    if kinds.find_model_kind(config["model"]) is not kinds.SOUND:
        found["wide"] = {"size": (3, 5), "seed": 7}
    if "audio_end_in_s" in takes:  # 48 s of 4 samples each
        found["a part"] = {"audio_start_in_s": 5.3, "audio_end_in_s": 31.0, **guided}
        found["no negative prompt"] = {"negative_prompt": None, scale: 3.0}
        found["unequal prompts, no negative one"] = {**found["no negative prompt"], "prompt": [SHORT, LONG]}
    if "max_sequence_length" in takes:
        found["truncated prompt"] = {"prompt": LONG, "max_sequence_length": 6}
    if "guidance_scale" in takes and scale != "guidance_scale":
        found["another embedded guidance"] = {"guidance_scale": 7.0}
    if "guidance_scale_2" in takes:
        found["one scale for both experts"] = {**guided, "guidance_scale": 2.0, "guidance_scale_2": None}
        found["two scales"] = {**guided, "guidance_scale_2": 1.5}
    if "layers" in takes:
        found |= {"two layers": {"layers": 2}, "one layer": {"layers": 1, **guided}}
    if "num_frames" in takes:
        found |= {"one frame": {"num_frames": 1}, "nine frames": {"num_frames": 9, **guided}}
    found |= {f"{count} images": {"images": count, **guided} for count in range(least + 1, most + 1)}
    return found
