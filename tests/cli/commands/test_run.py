"""The command line on every kind of model: other programs open its outputs, and the outputs can be replayed."""

from __future__ import annotations

import json

import av
import numpy as np
import pytest
from PIL import Image

from hydrarun.cli import main
from hydrarun.engine.runner import Runner
from tests.helpers import tiny
from tests.helpers.subjects import IMAGE, pictures


def run(subject, folder, *overrides: str) -> dict:
    """Run a command that must succeed; return its run.json."""
    assert main.main([*subject.overrides(), f"hydra.run.dir={folder}", *overrides]) == 0
    return json.loads((folder / "run.json").read_text())


@pytest.mark.parametrize("subject", ["wan22_t2v_a14b"], indirect=True)
def test_a_video_that_a_player_opens(subject, tmp_path, capsys):
    record = run(subject, tmp_path, "sampling.num_frames=9", "sampling.width=96", "output.fps=12")
    (output,) = record["outputs"]
    with av.open(str(tmp_path / output["path"])) as container:
        video = container.streams.video[0]
        shapes = [frame.to_ndarray(format="rgb24").shape for frame in container.decode(video)]
        assert (video.codec_context.name, video.average_rate) == ("h264", 12)
        assert json.loads(container.metadata["comment"])["config"]["sampling"]["num_frames"] == 9
    assert shapes == [(64, 96, 3)] * 9
    assert (output["frames"], output["fps"]) == (9, 12)
    assert main.main(["replay", str(tmp_path / output["path"]), f"hydra.run.dir={tmp_path / 'again'}"]) == 0
    assert "identical pixels" in capsys.readouterr().out


@pytest.mark.parametrize("subject", ["wan22_i2v_a14b"], indirect=True)
def test_frames_without_loss(subject, tmp_path, capsys):
    """The PNG files hold the exact pixels; any of them is enough to replay the video."""
    record = run(subject, tmp_path, "output.format=frames")
    folder = tmp_path / record["outputs"][0]["path"]
    files = sorted(folder.iterdir())
    state = subject.draw()
    assert [file.name for file in files] == [f"frame-{number:05d}.png" for number in range(5)]
    for file, frame in zip(files, state.frames[0], strict=True):
        assert np.array_equal(np.asarray(Image.open(file)), frame)
    assert main.main(["replay", str(files[3]), f"hydra.run.dir={tmp_path / 'again'}"]) == 0
    assert "identical pixels" in capsys.readouterr().out


@pytest.mark.parametrize("subject", ["wan22_i2v_a14b"], indirect=True)
def test_a_replay_says_that_the_input_image_is_another(subject, tmp_path, capsys):
    image = tmp_path / "given.png"
    pictures(1)[0].save(image)
    record = run(subject, tmp_path / "run", f"input.images={image}")
    file = str(tmp_path / "run" / record["outputs"][0]["path"])
    Image.new("RGB", (64, 64), (1, 2, 3)).save(image)  # another picture under the same name
    assert main.main(["replay", file, f"hydra.run.dir={tmp_path / 'again'}"]) == 1
    assert record["inputs"][0]["sha256"] in capsys.readouterr().out
    elsewhere = tmp_path / "kept.png"
    pictures(1)[0].save(elsewhere)
    asked = ["replay", file, f"input.images=[{elsewhere}]", f"hydra.run.dir={tmp_path / 'third'}"]
    assert main.main(asked) == 0


@pytest.mark.parametrize("subject", ["qwen_image_edit_plus"], indirect=True)
def test_an_edit_of_two_images(subject, tmp_path):
    first, second = tmp_path / "a b, (1).png", tmp_path / "ü.png"
    for image, file in zip(pictures(2), (first, second), strict=True):
        image.save(file)
    record = run(subject, tmp_path / "run", f'input.images=["{first}", {second}]')
    assert [entry["path"] for entry in record["inputs"]] == [str(first), str(second)]
    assert [(entry["width"], entry["height"]) for entry in record["inputs"]] == [(100, 64), (64, 100)]
    drawn = np.asarray(Image.open(tmp_path / "run" / record["outputs"][0]["path"]))
    assert np.array_equal(drawn, subject.draw(images=2).frames[0, 0])


@pytest.mark.parametrize("subject", ["qwen_image_edit"], indirect=True)
def test_the_size_follows_the_image(subject):
    """The size is that of the reference: about a megapixel in the proportions of the image."""
    from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit import calculate_dimensions

    (image,) = pictures(1)
    state = subject.draw(num_inference_steps=2, height=None, width=None)
    assert (state.width, state.height) == calculate_dimensions(1024 * 1024, image.width / image.height)[:2]
    assert state.frames.shape[2:4] == (state.height, state.width)


@pytest.mark.parametrize("subject", ["wan22_ti2v_5b"], indirect=True)
def test_without_an_image_there_is_a_size_of_its_own(subject):
    from hydrarun.pipeline.request import make_state

    stage = subject.runner.built.stages[0]
    sizes = []
    for images in ([], pictures(1)):
        fields = {**subject.runner.config["sampling"], "height": None, "width": None}
        state = make_state(fields, images)
        stage(state, subject.runner.built.parts, None)
        sizes.append((state.height, state.width))
    assert sizes[0] == (704, 1280)
    assert sizes[1] == (768, 1184)  # 100 x 64 pixels at 901,120, to multiples of 32


@pytest.mark.parametrize("subject", ["qwen_image_edit"], indirect=True)
def test_a_placeholder_in_the_prompt_is_refused(subject):
    from hydrarun.core.errors import UsageError

    with pytest.raises(UsageError, match=r"holds <\|image_pad\|>, which stands for an input image"):
        subject.runner.generate(prompt="a <|image_pad|>", images=[str(subject.folder.parent / IMAGE)])


@pytest.mark.parametrize("subject", ["flux_dev"], indirect=True)
def test_a_picture_with_embedded_guidance(subject, tmp_path):
    record = run(subject, tmp_path, "sampling.guidance_scale=5.0")
    drawn = np.asarray(Image.open(tmp_path / record["outputs"][0]["path"]))
    assert np.array_equal(drawn, subject.draw(guidance_scale=5.0).frames[0, 0])
    assert not np.array_equal(drawn, subject.draw().frames[0, 0])


@pytest.mark.parametrize("subject", ["wan21_t2v_14b"], indirect=True)
def test_another_scheduler_by_target(subject):
    """A flow-matching scheduler instead of the checkpoint's gives the result of diffusers with the same scheduler."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

    from hydrarun.config.compose import compose_config

    node = "model.scheduler={_target_: diffusers.FlowMatchEulerDiscreteScheduler, shift: 5.0}"
    state = tiny.draw(Runner(compose_config([*subject.overrides(), node])))
    parts = {**subject.pipeline.components, "scheduler": FlowMatchEulerDiscreteScheduler(shift=5.0)}
    pipeline = WanPipeline(**parts)
    pipeline.set_progress_bar_config(disable=True)
    assert (tiny.reference(pipeline, state, "latent") - state.latents).abs().max() <= 1e-4
    assert (state.latents - subject.draw().latents).abs().max() > 1e-2
