"""The processor for text and pictures, against its settings and, if torchvision is installed, transformers' own."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2VLImageProcessorPil, Qwen2VLProcessor

from hydrarun.core.errors import RunError
from hydrarun.pipeline.components import translate_load_errors
from hydrarun.pipeline.processors import load_processor
from tests.helpers import tiny

PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
#: the settings of Qwen/Qwen-Image-Edit, with a smaller bound on pixels
SETTINGS = {
    "image_processor_type": "Qwen2VLImageProcessorFast",
    "processor_class": "Qwen2_5_VLProcessor",
    "do_convert_rgb": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "min_pixels": 784,
    "max_pixels": 12544,
    "size": {"longest_edge": 12544, "shortest_edge": 784},
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
}
VIDEO_SETTINGS = {"video_processor_type": "Qwen2VLVideoProcessor", "processor_class": "Qwen2_5_VLProcessor"}


def published(folder: Path, **settings: Any) -> Path:
    """The processor folder of an edit checkpoint."""
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<|video_pad|>"], special_tokens=True)
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({**SETTINGS, **settings}))
    (folder / "video_preprocessor_config.json").write_text(json.dumps(VIDEO_SETTINGS))
    return folder


def load(folder: Path) -> Any:
    """Load the processor as `load_component` does."""
    with translate_load_errors(folder):
        return load_processor(Qwen2VLProcessor, folder)


def pictures() -> list[Image.Image]:
    """40x70, 300x200 (above the bound) and 28x28 pixels of noise, height first."""
    generator = np.random.default_rng(0)
    sizes = ((40, 70), (300, 200), (28, 28))
    return [Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


def call(processor: Any) -> Any:
    """Two prompts, one with two pictures, as the pipelines call it."""
    text = [f"{PICTURE}cat", f"a longer one {PICTURE}{PICTURE}"]
    return processor(text=text, images=pictures(), padding=True, return_tensors="pt")


def test_every_picture_becomes_a_grid_of_patches_and_a_run_of_tokens(tmp_path):
    processor = load(published(tmp_path))
    inputs = call(processor)
    assert inputs["image_grid_thw"].tolist() == [[1, 2, 4], [1, 8, 6], [1, 2, 2]]  # in patches of 14 pixels
    start, end, pad = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"
    runs = [start + count * pad + end for count in (2, 12, 1)]  # patches are merged two by two
    plain = tiny.tokenizer()([f"{runs[0]}cat", f"a longer one {runs[1]}{runs[2]}"], padding=True, return_tensors="pt")
    assert torch.equal(inputs["input_ids"], plain["input_ids"])
    assert torch.equal(inputs["attention_mask"], plain["attention_mask"])


def test_pictures_are_scaled_and_normalised_as_the_settings_say(tmp_path):
    half = load(published(tmp_path, image_mean=[0.5, 0.5, 0.5], image_std=[0.25, 0.5, 1.0]))
    image = Image.new("RGB", (28, 28), (255, 0, 102))
    values = half(text=[PICTURE], images=[image], padding=True, return_tensors="pt")["pixel_values"]
    # four patches, each: colour, time, height, width
    expected = torch.tensor([2.0, -1.0, -0.1]).repeat_interleave(2 * 14 * 14).expand(4, -1)
    assert torch.allclose(values, expected, atol=1e-6)


def test_saved_by_transformers_5_it_loads_again(tmp_path):
    first = load(published(tmp_path / "published"))
    first.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "preprocessor_config.json").exists()
    second = load(tmp_path / "saved")
    one, other = call(first), call(second)
    assert sorted(one) == sorted(other)
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert second.chat_template == "{{ messages[0].content }}"


def test_the_fast_and_the_plain_image_processor_are_read_alike(tmp_path):
    fast = load(published(tmp_path / "fast"))
    plain = load(published(tmp_path / "plain", image_processor_type="Qwen2VLImageProcessor"))
    assert type(fast.image_processor) is type(plain.image_processor) is Qwen2VLImageProcessorPil
    assert torch.equal(call(fast)["pixel_values"], call(plain)["pixel_values"])


def test_without_image_settings_one_line_says_so(tmp_path):
    with pytest.raises(RunError) as error:
        load(tmp_path)
    assert str(error.value) == f"{tmp_path}: no preprocessor_config.json and no processor_config.json here"


def test_damaged_settings_are_named(tmp_path):
    (published(tmp_path) / "preprocessor_config.json").write_text("{")
    with pytest.raises(RunError, match=r"preprocessor_config\.json' is not a valid JSON file"):
        load(tmp_path)


def test_a_tokenizer_that_is_missing_or_of_another_model_is_refused(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(SETTINGS))
    with pytest.raises(RunError, match=f"{tmp_path}: cannot be loaded: .*tokenizer"):
        load(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(RunError) as error:
        load(tmp_path)
    assert str(error.value) == (
        f"{tmp_path}: its tokenizer is missing or of another model: it has no token <|video_pad|>"
    )


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="transformers' own needs torchvision")
def test_transformers_own_processor_gives_the_same(tmp_path):
    folder = published(tmp_path)
    ours, theirs = call(load(folder)), call(Qwen2VLProcessor.from_pretrained(folder))
    assert sorted(ours) == sorted(theirs)
    for key in ("input_ids", "attention_mask", "image_grid_thw", "mm_token_type_ids"):
        assert torch.equal(ours[key], theirs[key]), key
    # resized by Pillow here and by torch there: they may round to neighbouring levels (1/255, divided by a deviation)
    assert torch.allclose(ours["pixel_values"], theirs["pixel_values"], atol=1.01 / 255 / min(SETTINGS["image_std"]))
