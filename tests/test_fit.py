"""What a checkpoint cannot make is refused from its JSON alone, with what would do."""

from __future__ import annotations

import subprocess
import sys

import pytest
import tiny

from hydrarun.errors import UsageError
from hydrarun.fit import check_guidance_scale, check_size, size_multiple


def test_the_multiple_is_the_pipelines_own(tiny_pipeline, tiny_folder, demo_folder):
    assert size_multiple(tiny_folder) == tiny_pipeline.vae_scale_factor * 2 == 8
    assert size_multiple(demo_folder) == 16


def test_a_folder_that_does_not_tell(tmp_path):
    assert size_multiple(tmp_path) is None


@pytest.mark.parametrize(
    ("height", "width", "message"),
    [
        (100, 64, "sampling.height=100: .* multiple of 16: sampling.height=96 or sampling.height=112"),
        (64, 72, "sampling.width=72: .* sampling.width=64 or sampling.width=80"),
        (8, 64, "sampling.height=8: .* multiple of 16: sampling.height=16$"),
    ],
)
def test_the_nearest_sizes_are_offered(height, width, message):
    with pytest.raises(UsageError, match=message):
        check_size(height, width, 16)


def test_a_wrong_size_is_refused_while_composing(tiny_folder):
    with pytest.raises(UsageError, match=r"sampling.height=60: .*sampling.height=56 or sampling.height=64"):
        tiny.config(tiny_folder, "sampling.height=60")


def test_the_command_refuses_it_without_importing_torch():
    command = [sys.executable, "-X", "importtime", "-m", "hydrarun", "sampling.height=100"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 2
    assert "sampling.height=100: this checkpoint needs a multiple of 16" in finished.stderr
    assert "Traceback" not in finished.stderr
    assert " torch\n" not in finished.stderr


def test_a_guidance_scale_that_would_be_ignored_is_refused_while_composing(tiny_folder):
    with pytest.raises(UsageError, match=r"sampling.guidance_scale=3.5: .*use sampling.true_cfg_scale"):
        tiny.config(tiny_folder, "sampling.guidance_scale=3.5")


@pytest.mark.parametrize(("scale", "distilled"), [(None, False), (None, True), (3.5, True)])
def test_guidance_scales_that_are_used(scale, distilled):
    check_guidance_scale(scale, distilled)
