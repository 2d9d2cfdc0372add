"""Qwen-Image-Layered: its unique features, against diffusers' pipeline and on the command line."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers.pipelines.qwenimage.pipeline_qwenimage_layered import calculate_dimensions
from PIL import Image

from hydrarun.cli import main
from hydrarun.config.compose import compose_config
from hydrarun.core.errors import UsageError
from hydrarun.engine.runner import Runner
from hydrarun.outputs.media import frames
from hydrarun.pipeline.stages.images import SizeFromImage
from tests.helpers import parallel_runs, tiny
from tests.helpers.subjects import CONFIGS, pictures

NAME = "qwen_image_layered"
LATENTS = 1e-4

only = pytest.mark.parametrize("subject", [NAME], indirect=True)


def given(subject) -> Image.Image:
    return pictures(1, CONFIGS[NAME])[0]


def theirs(subject, **more) -> list[Image.Image]:
    """Return diffusers' layers for the small run, with seed 0."""
    side = 4 * subject.multiple
    fields = {"negative_prompt": " ", "true_cfg_scale": 4.0, "num_inference_steps": 4, **more}
    generator = [torch.Generator().manual_seed(0)]
    with tiny.drawn_at(subject.pipeline, side, side):
        return subject.pipeline(image=given(subject), generator=generator, **fields).images[0]


def reference_caption(subject, english: bool) -> str:
    """Return diffusers' caption of the image at the size of the small run."""
    side = 4 * subject.multiple
    image = subject.pipeline.image_processor.resize(given(subject), side, side)
    return subject.pipeline.get_image_caption(image, use_en_prompt=english, device="cpu")


def assert_equal(layers, wanted: list[Image.Image]) -> None:
    assert len(layers) == len(wanted)
    for ours, reference in zip(layers, wanted, strict=True):
        assert reference.mode == "RGBA"
        assert np.abs(np.asarray(ours).astype(int) - np.asarray(reference).astype(int)).max() <= 1


@only
def test_a_blank_prompt_is_the_images_caption(subject):
    captions = [subject.draw(prompt=prompt, num_inference_steps=1).caption for prompt in ("", " ")]
    wanted = reference_caption(subject, english=True)
    assert captions == [wanted] * 2
    assert wanted
    assert_equal(subject.draw(prompt="").frames[0], theirs(subject, prompt="", use_en_prompt=True))
    assert subject.draw(prompt="a cat", num_inference_steps=1).caption is None


@only
def test_a_caption_is_written_as_the_checkpoint_says(subject):
    settings = subject.runner.built.parts.pipeline.text_encoder.generation_config
    assert settings.repetition_penalty == 1.3
    config = json.loads(json.dumps(subject.runner.config))
    stage = next(node for node in config["model"]["stages"] if "english" in node)
    stage["english"] = False
    chinese = tiny.draw(Runner(config), [given(subject)], prompt="", num_inference_steps=1).caption
    assert chinese == reference_caption(subject, english=False)
    assert chinese != subject.draw(prompt="", num_inference_steps=1).caption


@only
def test_no_prompt_is_a_blank_one(subject):
    side = 4 * subject.multiple
    drawn = subject.runner.generate(prompt=None, height=side, width=side, num_inference_steps=1)
    assert [(one.prompt, one.caption, one.pixels.shape) for one in drawn] == [
        ("", reference_caption(subject, english=True), (4, side, side, 4))
    ]


@only
def test_one_caption_for_the_blank_prompts_of_a_batch(subject):
    batch = subject.draw(prompt=["", "a cat", ""], seed=[1, 2, 3], negative_prompt=" ")
    for index, prompt in enumerate(("", "a cat", "")):
        single = subject.draw(prompt=prompt, seed=index + 1)
        assert (single.latents[0] - batch.latents[index]).abs().max() <= LATENTS


@only
@pytest.mark.parametrize("option", ["model", "disk"])
def test_a_caption_is_written_by_an_encoder_that_comes_for_it(subject, fake, option):
    overrides = [one for one in subject.overrides() if not one.startswith("device=")]
    config = compose_config([*overrides, "device=cuda", f"offload={option}"])
    state = tiny.draw(Runner({**config, "device": "fake"}), [given(subject)], prompt="", num_inference_steps=1)
    assert state.caption == reference_caption(subject, english=True)


@only
def test_ranks_have_one_caption_whichever_prompts_are_theirs(subject, pool):
    """Two ranks split the pictures and shard the text encoder's weights; one of them has no blank prompt."""
    assert pool(2, parallel_runs.text_of_first) == ["a cat, 一只猫"] * 2
    side = 4 * subject.multiple
    fields = {"prompt": ["a cat", ""], "seed": [1, 2], "negative_prompt": " ", "num_inference_steps": 2}
    fields |= {"height": side, "width": side}
    alone = subject.draw(**fields).frames.astype(int)
    shares = {"data_degree": 2, "hsdp_degree": 2}
    for frames_of_all, _, _ in pool(2, parallel_runs.draw, NAME, subject.folder, shares, 1, fields):
        assert np.abs(frames_of_all - alone).max() <= 1


@only
def test_rescaled_guidance_is_diffusers_cfg_normalize(subject):
    config = json.loads(json.dumps(subject.runner.config))
    config["model"]["guidance"]["rescale_norm"] = True
    state = tiny.draw(Runner(config), [given(subject)], prompt="a cat")
    assert_equal(state.frames[0], theirs(subject, prompt="a cat", cfg_normalize=True))
    assert (state.latents - subject.draw(prompt="a cat").latents).abs().max() > 100 * LATENTS


@pytest.mark.parametrize("resolution", [640, 1024])
@pytest.mark.parametrize("size", [(64, 100), (1920, 1080), (500, 500)])
def test_the_size_is_of_that_resolution_in_the_images_proportions(resolution, size):
    from hydrarun.pipeline.request import make_state

    sampling = {**CONFIGS[NAME]["sampling"], "prompt": "", "resolution": resolution}
    state = make_state(sampling, [Image.new("RGBA", size)])
    SizeFromImage(area=None, multiple=32)(state, None, None)
    assert (state.width, state.height) == calculate_dimensions(resolution**2, size[0] / size[1])


@only
def test_the_command_writes_each_layer_and_draws_them_again(subject, tmp_path, capsys):
    overrides = [one for one in subject.overrides() if not one.startswith("sampling.prompt")]
    assert main.main([*overrides, f"hydra.run.dir={tmp_path}", "report.metrics=[psnr,ssim]"]) == 0
    said = capsys.readouterr().err
    record = json.loads((tmp_path / "run.json").read_text())
    (output,) = record["outputs"]
    folder = tmp_path / output["path"]
    files = sorted(folder.iterdir())
    assert [file.name for file in files] == [f"layer-{number}.png" for number in range(4)]
    images = [Image.open(file) for file in files]
    assert {(image.mode, image.size) for image in images} == {("RGBA", (32, 32))}
    assert_equal(images, theirs(subject, prompt="", use_en_prompt=True))
    assert (output["layers"], output["prompt"], output["width"]) == (4, "", 32)
    assert output["caption"] == subject.draw(prompt="", num_inference_steps=1).caption
    assert "the prompt is blank; the input image's caption: " in said
    assert output["quality"] == {"psnr": 100.0, "ssim": pytest.approx(1.0)}
    for number, file in enumerate((folder, files[2], tmp_path / "run.json")):
        assert main.main(["replay", str(file), f"hydra.run.dir={tmp_path / f'again{number}'}"]) == 0
        assert "identical pixels" in capsys.readouterr().out


@only
def test_a_file_of_images_alone(subject, tmp_path):
    """A line with an image needs no prompt; each image gets its own caption."""
    for name, value in (("a.png", 40), ("b.png", 200)):
        pixels = np.asarray(given(subject)).copy()
        pixels[:30] = value
        Image.fromarray(pixels).save(tmp_path / name)
    lines = tmp_path / "lines.csv"
    lines.write_text("images,prompt\na.png,\nb.png,\na.png,a cat\n")
    kept = [one for one in subject.overrides() if not one.startswith(("sampling.prompt", "input.images"))]
    assert main.main([*kept, f"input.prompts={lines}", f"hydra.run.dir={tmp_path / 'run'}"]) == 0
    outputs = json.loads((tmp_path / "run" / "run.json").read_text())["outputs"]
    assert [bool(one.get("caption")) for one in outputs] == [True, True, False]
    layers = [frames.read_frames(tmp_path / "run" / one["path"])[0] for one in outputs]
    assert {one.shape for one in layers} == {(4, 32, 32, 4)}
    assert not np.array_equal(layers[0], layers[1])


def refused(*overrides: str) -> str:
    with pytest.raises(UsageError) as caught:
        compose_config([f"model={NAME}", "input.images=a.png", *overrides])
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("output.format=png", "'png': model qwen_image_layered draws layered pictures: layers."),
        ("output.format=frames", "'frames': model qwen_image_layered draws layered pictures: layers."),
        ("sampling.layers=0", "0 is below 1."),
        ("sampling.layers=null", "null, and model qwen_image_layered needs it."),
        ("sampling.resolution=800", "800 is none of 640, 1024, which model qwen_image_layered takes."),
        ("input.images=[a.png,b.png]", "lists 2 images; model qwen_image_layered takes 1."),
        ("cache=teacache", "TeaCache has no coefficients for model qwen_image_layered"),
    ],
)
def test_what_it_refuses(override, wanted):
    assert wanted in refused(override)


def test_other_models_have_no_layers():
    for override, wanted in (
        ("output.format=layers", "'layers': model qwen_image draws pictures: png."),
        ("sampling.layers=4", "model qwen_image does not take it"),
        ("sampling.prompt=", "'' is not a non-empty text"),
    ):
        given = ["sampling.prompt=a"] if "prompt" not in override else []
        with pytest.raises(UsageError, match=wanted):
            compose_config(["model=qwen_image", *given, override])
