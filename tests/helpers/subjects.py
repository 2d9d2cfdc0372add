"""Every model option with its tiny checkpoint, for tests that must pass for all models.

A new model needs a builder in `checkpoints.BUILDERS`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
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
    """The default configuration of each model, composed on first access."""

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

#: the other options
FAMILIES = [name for name in MODELS if name not in VARIANTS]


#: one option for each sort of transformer, for slow tests of shared code
SORTS = ("qwen_image_edit_plus", "flux_dev", "wan22_t2v_a14b", "zimage", "stable_audio")

#: the file for `input.images`, next to a subject's folder
IMAGE = "input.png"

#: tolerance by dtype: 1 of 255 for pictures, 1/1024 of the value range for sounds
TOLERANCE = {np.dtype(np.uint8): 1, np.dtype(np.int16): 64}

SHORT, LONG = "a cat", "two dogs, one of them “asleep”, on a 红色 sofa (wide shot)"


@dataclass
class Subject:
    """A model option: diffusers' pipeline, the folder where it is saved, and our runner on this folder."""

    name: str
    pipeline: Any
    folder: Path
    runner: Runner

    @property
    def multiple(self) -> int:
        """Pixels that height and width must be a multiple of."""
        return multiple(self.folder)

    def size(self, rows: int, columns: int) -> dict[str, int]:
        """Return the fields of `sampling` for a size of so many multiples; empty for sounds."""
        return sized(self.name, self.folder, rows, columns)

    def overrides(self) -> list[str]:
        """Return the command line of a small run."""
        return command(self.name, self.folder)

    def draw(
        self,
        images: int | None = None,
        size: tuple[int, int] | None = None,
        cache: dict[str, Any] | None = None,
        **sampling: Any,
    ) -> Any:
        """Draw; return the finished state. `images`: number of input images (None: the least), `size`: in multiples."""
        if size:
            sampling |= self.size(*size)
        least = CONFIGS[self.name]["model"]["input_images"][0]
        given = pictures(least if images is None else images, CONFIGS[self.name])
        return tiny.draw(self.runner, given, cache, **sampling)


def command(name: str, folder: Path) -> list[str]:
    """Return the command line of a small run of a saved subject."""
    size = [f"sampling.{key}={value}" for key, value in sized(name, folder, 4, 4).items()]
    plain = [
        word for word in tiny.overrides(folder, name) if not word.startswith(("sampling.height", "sampling.width"))
    ]
    frames = ["sampling.num_frames=5"] if is_video(CONFIGS[name]) else []
    image = [f"input.images={folder.parent / IMAGE}"] if CONFIGS[name]["model"]["input_images"][0] else []
    return [*plain, *size, *frames, *image]


def sized(name: str, folder: Path, rows: int, columns: int) -> dict[str, int]:
    """Return the fields for a size, as `Subject.size` does."""
    if kinds.find_model_kind(CONFIGS[name]["model"]) is kinds.SOUND:
        return {}
    return {"height": rows * multiple(folder), "width": columns * multiple(folder)}


def multiple(folder: Path) -> int:
    """Return the pixels that height and width of a saved subject must be a multiple of."""
    vae, transformer = (json.loads((folder / name / "config.json").read_text()) for name in ("vae", "transformer"))
    return find_size_multiple(read_vae_factors(vae)[1], transformer, patch=2)


def pictures(count: int, config: dict[str, Any] | None = None) -> list[Image.Image]:
    """Return input images of unequal sizes and proportions, with alpha if the model of `config` uses it."""
    generator = np.random.default_rng(0)
    channels = 4 if config and kinds.find_model_kind(config["model"]).alpha else 3
    sizes = [(64, 100), (100, 64), (64, 64)]  # scaled to a megapixel these give multiples of 64, as the tiny VAE needs
    values = [generator.integers(0, 256, (*size, channels), dtype=np.uint8) for size in sizes[:count]]
    return [Image.fromarray(one) for one in values]


def build(name: str, folder: Path) -> Subject:
    """Build the subject of this name in `folder`."""
    pictures(1, CONFIGS[name])[0].save(folder / IMAGE)
    pipeline = checkpoints.BUILDERS[name]()
    pipeline.save_pretrained(folder / name)
    subject = Subject(name, pipeline, folder / name, None)
    subject.runner = Runner(compose_config(subject.overrides()))
    for vae in (pipeline.vae, subject.runner.built.parts.pipeline.vae):
        vae.encode = remembering(vae.encode)
    return subject


def remembering(encode: Callable[..., Any], seen: dict[bytes, Any] | None = None) -> Callable[..., Any]:
    """Cache `encode` by input: a megapixel takes a second, and all cases have the same images."""
    seen = {} if seen is None else seen

    def encode_once(pixels: torch.Tensor) -> Any:
        key = hashlib.sha256(pixels.numpy().tobytes()).digest()
        if key not in seen:
            seen[key] = encode(pixels)
        return seen[key]

    return encode_once


def apart(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Return the largest difference of two outputs, divided by the tolerance."""
    assert ours.dtype == theirs.dtype
    return np.abs(ours.astype(int) - theirs.astype(int)).max() / TOLERANCE[ours.dtype]


def cases(name: str) -> dict[str, dict[str, Any]]:
    """Return the requests that test a model's numbers, chosen by the fields that its option supports."""
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
    if "audio_end_in_s" in takes:  # of 48 s at 4 samples/s
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
