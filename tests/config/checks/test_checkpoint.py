"""Requests that a checkpoint does not support are refused from its JSON alone, with valid values in the message."""

from __future__ import annotations

import subprocess
import sys

import pytest

from hydrarun.config.checks.checkpoint import (
    check_checkpoint_configs,
    check_guidance_scale,
    check_request_fit,
    check_skipped_layers,
    read_vae_factors,
)
from hydrarun.config.compose import compose_config
from hydrarun.core.errors import UsageError
from tests.helpers import tiny

WAN_LIKE = {"temperal_downsample": [False, True, True]}


def fit(vae: dict | None = None, transformer: dict | None = None, **sampling: object) -> None:
    given = {"height": 64, "width": 64, "num_frames": None, "guidance_scale": None, **sampling}
    check_request_fit(given, vae or {}, transformer or {}, patch=2)


def test_the_factors_are_the_pipelines_own(tiny_pipeline):
    assert read_vae_factors(tiny_pipeline.vae.config) == (2, tiny_pipeline.vae_scale_factor)


@pytest.mark.parametrize(
    ("config", "factors"),
    [
        ({}, (None, None)),
        (WAN_LIKE, (4, 8)),
        ({**WAN_LIKE, "scale_factor_spatial": 16, "scale_factor_temporal": 4}, (4, 16)),
        ({"block_out_channels": [128, 256, 512, 512]}, (None, 8)),
    ],
    ids=["untold", "halvings", "told", "still pictures"],
)
def test_factors(config, factors):
    assert read_vae_factors(config) == factors


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"height": 100}, "sampling.height=100: .* multiple of 16: sampling.height=96 or sampling.height=112"),
        ({"width": 72}, "sampling.width=72: .* sampling.width=64 or sampling.width=80"),
        ({"height": 8}, "sampling.height=8: .* multiple of 16: sampling.height=16$"),
        ({"num_frames": 80}, "sampling.num_frames=80: .* 4 plus 1: sampling.num_frames=77 or sampling.num_frames=81"),
        ({"num_frames": 2}, "sampling.num_frames=1 or sampling.num_frames=5"),
    ],
)
def test_the_nearest_values_are_offered(sampling, message):
    with pytest.raises(UsageError, match=message):
        fit(WAN_LIKE, **sampling)


@pytest.mark.parametrize("sampling", [{"height": None, "width": None}, {"num_frames": 1}, {"num_frames": 81}])
def test_what_fits(sampling):
    fit(WAN_LIKE, **sampling)


@pytest.mark.parametrize("key", ["height", "width"])
def test_more_places_than_the_checkpoint_has(key):
    few = {"pos_embed_max_size": 8}
    fit({"block_out_channels": [1, 2, 3, 4]}, few, **{key: 128})
    with pytest.raises(UsageError, match=rf"sampling.{key}=144: .* 8 tokens per side; sampling.{key}=128 at most$"):
        fit({"block_out_channels": [1, 2, 3, 4]}, few, **{key: 144})


def test_blocks_to_leave_out_that_are_not_there():
    check_skipped_layers([0, 2], 3)
    check_skipped_layers(None, 3)
    check_skipped_layers([7], 0)
    with pytest.raises(UsageError, match=r"^model.guidance.layers=\[1, 3\]: .* no block 3; its 3 blocks are 0 to 2$"):
        check_skipped_layers([1, 3], 3)


def test_json_that_does_not_tell_refuses_nothing():
    fit({}, {}, height=61, num_frames=80, guidance_scale=3.5)


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


@pytest.mark.parametrize(
    ("scale", "distilled", "message"),
    [
        (3.5, False, "sampling.guidance_scale=3.5: .*not guidance-distilled.*sampling.guidance_scale=null"),
        (0.0, False, "sampling.guidance_scale=0.0: "),
        (None, True, "sampling.guidance_scale=null: .*sampling.guidance_scale=3.5"),
    ],
)
def test_guidance_scales_that_the_checkpoint_ignores_or_lacks(scale, distilled, message):
    with pytest.raises(UsageError, match=message):
        fit(transformer={"guidance_embeds": distilled}, guidance_scale=scale)


@pytest.mark.parametrize(("scale", "distilled"), [(None, False), (3.5, True), (0.0, True)])
def test_guidance_scales_that_are_used(scale, distilled):
    check_guidance_scale(scale, distilled)


def test_more_ranks_than_heads_are_refused_while_composing(tiny_folder):
    with pytest.raises(UsageError, match=r"tensor_degree=4: this checkpoint has 3 heads.*tensor_degree=3 at most"):
        tiny.config(tiny_folder, "parallel=tp4")
    assert tiny.config(tiny_folder, "parallel=tp2")


@pytest.mark.parametrize(
    ("vae", "transformer", "message"),
    [
        ({"temperal_downsample": 3}, {}, "'int' object is not iterable"),
        ({"block_out_channels": 3}, {}, "object of type 'int' has no len()"),
        ({}, {"num_attention_heads": "8"}, "not supported between instances of 'str'"),
        ({}, {"num_attention_heads": 0}, "0 attention heads"),
        ({}, {"num_layers": "8"}, "unsupported operand"),
        ({"sampling_rate": 0, "downsampling_ratios": [2]}, {"sample_size": 8}, "division by zero"),
    ],
)
def test_values_of_the_wrong_kind_are_one_line(vae, transformer, message):
    config = compose_config(["sampling.prompt=a"])
    with pytest.raises(UsageError) as caught:
        check_checkpoint_configs(config, {}, vae, transformer)
    said = str(caught.value)
    assert said.startswith("model.path=package:demo: its model_index.json, vae/config.json or transformer/config.json")
    assert message in said
    assert "\n" not in said
