"""The tiny checkpoints are fit for tests: they load like published ones, and every input affects the output."""

from __future__ import annotations

import inspect
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hydrarun.pipeline.processors import load_processor
from tests.helpers import checkpoints, tiny
from tests.helpers.subjects import remembering

#: one option name for every builder of random weights
NAMES = sorted({build: name for name, build in checkpoints.BUILDERS.items() if name != "demo"}.values())
PROMPT = "a red cat on the roof of an old house"
FROM_IMAGES = ("qwen_image_edit", "qwen_image_edit_plus", "qwen_image_layered", "longcat_image_edit", "wan22_i2v_a14b")
LAYERED = "qwen_image_layered"
SOUNDS = ("stable_audio",)
NOISE = 1e-2  # levels of 255: tolerance for rounding
MATTERS = 0.1  # levels of 255, on average: minimum difference between pictures


@cache
def pipeline(name: str) -> Any:
    built = checkpoints.BUILDERS[name]()
    built.vae.encode = remembering(built.vae.encode)
    return built


def load(name: str, folder: Path) -> Any:
    """Load a saved pipeline with diffusers, but the processor with our loader, because theirs needs torchvision."""
    processors = [file.parent for file in folder.glob("*processor/processor_config.json")]
    ours = {found.name: load_processor(type(getattr(pipeline(name), found.name)), found) for found in processors}
    loaded = type(pipeline(name)).from_pretrained(folder, **ours)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def smallest(name: str) -> dict[str, int]:
    """Return height, width and number of frames of a small run; empty for sounds."""
    if name in SOUNDS:
        return {}
    if name.startswith("wan"):
        return {"height": 32, "width": 32, "num_frames": 5}
    size = 128 if "edit" in name else 64 if name.startswith(("qwen", "glm")) else 32
    return {"height": size, "width": size}


def picture(seed: int, channels: int = 3) -> Image.Image:
    colors = np.random.default_rng(seed).integers(0, 256, (4, 4, channels), dtype=np.uint8)
    return Image.fromarray(colors).resize((64, 64), Image.Resampling.BICUBIC)


def draw(pipeline: Any, name: str, prompt: str = PROMPT, seeds: tuple[int, ...] = (0, 1), image: int = 0) -> np.ndarray:
    """Run two steps. Returns levels 0 to 255 as floats, [N, H, W, 3] or [N, F, H, W, 3], with one entry per seed.

    Layers are [N, L, H, W, 4], drawn one at a time: diffusers splits a batch of them in the wrong places.
    Sounds are [N, 1, samples, channels].
    """
    if name == LAYERED and len(seeds) > 1:
        return np.concatenate([draw(pipeline, name, prompt, (seed,), image) for seed in seeds])
    copies = "num_videos_per_prompt" if name.startswith("wan") else "num_images_per_prompt"
    copies = "num_waveforms_per_prompt" if name in SOUNDS else copies
    arguments: dict[str, Any] = {copies: len(seeds), **smallest(name), **tiny.as_written(pipeline)}
    if name in FROM_IMAGES:
        arguments["image"] = picture(image, 4 if name == LAYERED else 3)
    size = {side: arguments.get(side, 0) for side in ("height", "width")}
    if "height" not in inspect.signature(pipeline.__call__).parameters:
        arguments = {key: value for key, value in arguments.items() if key not in size}
    with tiny.drawn_at(pipeline, **size):
        output = pipeline(
            prompt=prompt,
            num_inference_steps=2,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="np",
            **arguments,
        )
    if name in SOUNDS:
        return (127.5 + 127.5 * np.asarray(output[0])).transpose(0, 2, 1)[:, None]
    return 255 * np.asarray(output[0])


@cache
def drawn(name: str) -> tuple[np.ndarray, list[float]]:
    """Return the run that others are compared with, and the standard deviation of every transformer output."""
    sizes: list[float] = []
    transformers = [pipeline(name).transformer, getattr(pipeline(name), "transformer_2", None)]
    hooks = [
        module.register_forward_hook(lambda module, inputs, output: sizes.append(size_of(output[0])))
        for module in transformers
        if module is not None
    ]
    pictures = draw(pipeline(name), name)
    for hook in hooks:
        hook.remove()
    return pictures, sizes


def size_of(output: torch.Tensor | list[torch.Tensor]) -> float:
    """Return the standard deviation of a batch's prediction, which some references return as a list of items."""
    return float(torch.stack([*output]).std())


def difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).mean())


def settings(configured: Any) -> dict[str, Any]:
    """Return the config of a pipeline or scheduler, without components and the library's private keys."""
    return {
        key: value
        for key, value in configured.config.items()
        if not key.startswith("_") and not isinstance(value, (list, tuple))
    }


def assert_same_weights(one: Any, other: Any) -> None:
    for component, module in other.components.items():
        if isinstance(module, torch.nn.Module):
            found = getattr(one, component).state_dict()
            assert found.keys() == module.state_dict().keys()
            assert all(torch.equal(value, found[key]) for key, value in module.state_dict().items()), component


@pytest.mark.sample(5)
@pytest.mark.parametrize("name", NAMES)
def test_pictures_are_neither_flat_nor_saturated(name):
    pictures, sizes = drawn(name)
    size = smallest(name)
    frames = (size["num_frames"],) if "num_frames" in size else (4,) if name == LAYERED else ()
    channels = 4 if name == LAYERED else 3
    assert pictures.shape == ((2, *frames, size["height"], size["width"], channels) if size else (2, 1, 192, 2))
    assert np.isfinite(pictures).all()
    assert pictures.std(axis=(-3, -2)).min() > 5  # in every channel of every picture
    assert ((pictures.round() > 0) & (pictures.round() < 255)).mean() > 0.9
    assert min(sizes) > 0.5
    assert max(sizes) < 3


@pytest.mark.parametrize("name", NAMES)
def test_the_seed_matters(name):
    pictures, _ = drawn(name)
    assert difference(pictures[0], pictures[1]) > 5


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", FROM_IMAGES)
def test_the_image_matters(name):
    assert difference(draw(pipeline(name), name, seeds=(0,), image=1)[0], drawn(name)[0][0]) > MATTERS


@pytest.mark.sample(5)
@pytest.mark.parametrize("name", NAMES)
def test_a_saved_pipeline_loads_with_the_same_weights_and_settings(name, tmp_path):
    pipeline(name).save_pretrained(tmp_path)
    loaded = load(name, tmp_path)
    assert_same_weights(loaded, pipeline(name))
    assert settings(loaded) == settings(pipeline(name))
    assert settings(loaded.scheduler) == settings(pipeline(name).scheduler)
    if "edit" in name:  # a run takes a second; apart from the encoding it only depends on the weights
        with torch.no_grad():
            ours, theirs = (made.encode_prompt(PROMPT, [picture(0)])[0] for made in (loaded, pipeline(name)))
        assert torch.equal(ours, theirs)
    else:
        assert np.abs(draw(loaded, name) - drawn(name)[0]).max() < NOISE


@pytest.mark.parametrize("name", NAMES)
def test_every_weight_of_the_transformers_is_random(name):
    built = pipeline(name)
    for module in (built.transformer, getattr(built, "transformer_2", None)):
        for key, weight in module.named_parameters() if module is not None else ():
            assert weight.std() > 0.05, key


@pytest.mark.parametrize("name", NAMES)
def test_a_builder_makes_the_same_weights_every_time(name):
    assert_same_weights(checkpoints.BUILDERS[name](), pipeline(name))


@pytest.mark.parametrize("name", ["wan22_t2v_a14b", "wan22_i2v_a14b"])
def test_both_experts_run_and_differ(name):
    built = pipeline(name)
    drawn(name)
    steps = built.scheduler.timesteps / 1000  # of the last run
    assert [bool(step >= built.config.boundary_ratio) for step in steps] == [True, False]
    assert not torch.equal(built.transformer.proj_out.weight, built.transformer_2.proj_out.weight)


def test_an_edit_checkpoint_says_what_published_ones_say(tmp_path):
    built = pipeline("qwen_image_edit")
    built.save_config(tmp_path)
    assert built.load_config(tmp_path)["processor"] == ["transformers", "Qwen2VLProcessor"]


def test_the_options_differ_in_what_the_published_ones_differ_in():
    guided = {name: pipeline(name).transformer.config.guidance_embeds for name in ("flux_dev", "flux_schnell")}
    assert guided == {"flux_dev": True, "flux_schnell": False}
    shifted = {name: pipeline(name).scheduler.config.use_dynamic_shifting for name in guided}
    assert shifted == {"flux_dev": True, "flux_schnell": False}
    zeroed = [pipeline(name).transformer.config.zero_cond_t for name in ("qwen_image_edit", "qwen_image_edit_plus")]
    assert zeroed == [False, True]
    wan = {name: pipeline(name).config.boundary_ratio for name in NAMES if name.startswith("wan")}
    assert list(wan) == ["wan21_t2v_1_3b", "wan22_i2v_a14b", "wan22_t2v_a14b", "wan22_ti2v_5b"]
    assert list(wan.values()) == [None, 0.9, 0.875, None]
    assert [pipeline(name).config.get("expand_timesteps", False) for name in wan] == [False, False, False, True]
    assert [pipeline(name).scheduler.config.flow_shift for name in wan] == [3.0, 3.0, 3.0, 5.0]
    assert [pipeline(name).vae_scale_factor_spatial for name in wan] == [8, 8, 8, 16]
    assert [pipeline(name).vae_scale_factor_temporal for name in wan] == [4, 4, 4, 4]
