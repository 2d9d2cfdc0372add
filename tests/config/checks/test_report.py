"""Checks of the section `report`: each mistake is one sentence that says how to fix it."""

import subprocess
import sys

import pytest
import yaml

from hydrarun.config.checks import report
from hydrarun.core import resources
from hydrarun.outputs.quality import scene_judge

SDPA = {"_target_": "hydrarun.models.layers.attention_backends.SDPA"}


def found(*, prompt="a red circle", size=(64, 64), judged="scenes", **changes) -> list[tuple[str, str]]:
    config = {
        "model": {"name": "m", "judge": judged, "takes": []},
        "sampling": {"prompt": prompt, "height": size[0], "width": size[1]},
        "attention": SDPA,
        "report": {"metrics": [], "noise_floor": [], "objectives": [], "twins": "outputs/twins", **changes},
    }
    return list(report.find_problems(config))


def test_what_is_right():
    assert found() == []
    assert found(prompt="a cat", judged=None, metrics=["psnr", "ssim"], noise_floor=["repeat", "flex"]) == []
    assert found(prompt=["a red circle", "a blue star on a white background"], metrics=["accuracy"]) == []


@pytest.mark.parametrize(
    ("asked", "key", "sentence"),
    [
        ({"metrics": ["psrn"]}, "metrics", "'psrn' is none of psnr, ssim, snr, accuracy. Did you mean 'psnr'?"),
        ({"metrics": ["psnr", "ssim", "psnr"]}, "metrics", "lists 'psnr' twice."),
        ({"metrics": ["ssim"] * 3}, "metrics", "lists 'ssim' 3 times."),
        (
            {"metrics": ["lpips"]},
            "metrics",
            "'lpips': the published packages ship only its linear layers (as pickles); the network underneath, AlexNet "
            "or VGG from torchvision, would have to be downloaded, and nothing is downloaded to measure. Use psnr, "
            "ssim.",
        ),
        (
            {"metrics": ["accuracy"], "judged": None},
            "metrics",
            "'accuracy': model m has no judge (model.judge). Use psnr, ssim.",
        ),
        (
            {"metrics": ["accuracy"], "prompt": ["a red circle", "a cat", "a dog"]},
            "metrics",
            "'accuracy' judges only scenes as docs/demo-model.md words them: caption 'a cat': not understood: 'cat'.",
        ),
        (
            {"metrics": ["accuracy"], "size": (64, 96)},
            "metrics",
            "'accuracy' judges square pictures of at least 64 pixels a side, not 96x64.",
        ),
        (
            {"metrics": ["accuracy"], "size": (56, 56)},
            "metrics",
            "'accuracy' judges square pictures of at least 64 pixels a side, not 56x56.",
        ),
        (
            {"metrics": ["psnr"], "noise_floor": ["flx"]},
            "noise_floor",
            "'flx' is none of repeat, cudnn, flash, flex, sage, sdpa. Did you mean 'flex'?",
        ),
        ({"metrics": ["psnr"], "noise_floor": ["flex", "flex"]}, "noise_floor", "lists 'flex' twice."),
        (
            {"noise_floor": ["repeat"]},
            "noise_floor",
            "without report.metrics it has no effect: report.metrics=[psnr,ssim]",
        ),
        (
            {"metrics": ["psnr"], "noise_floor": ["sdpa"]},
            "noise_floor",
            "'sdpa' is the run's own attention: use repeat to draw with it again.",
        ),
        ({"twins": ""}, "twins", "names no folder: report.twins=outputs/twins"),
    ],
)
def test_mistakes(asked, key, sentence):
    assert found(**asked) == [(f"report.{key}", sentence)]


def test_the_judge_needs_what_is_checked_here():
    assert report.SMALLEST_SIDE == scene_judge.SMALLEST_SIDE


def test_options_are_those_of_conf():
    attention = resources.read_options("attention")
    assert attention["sdpa"] == SDPA
    for name, node in attention.items():
        file = resources.find_folder("conf") / "attention" / f"{name}.yaml"
        assert yaml.safe_load(file.read_text(encoding="utf-8")) == node


def test_checking_imports_nothing_heavy():
    heavy = ("torch", "skimage", "scipy", "numpy", "PIL", "hydra")
    code = f"import sys, hydrarun.config.checks.report; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"
