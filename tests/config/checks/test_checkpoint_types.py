"""Values in a checkpoint's JSON files have the types that the checks before a run count with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from hydrarun.config.checks.checkpoint_types import INDEX, LATENTS, SOUND, TRANSFORMER, VAE, check_types
from hydrarun.core.errors import RunError
from tests.helpers import tiny

FILES = [INDEX, TRANSFORMER, VAE, SOUND]


@pytest.mark.parametrize("checks", FILES, ids=["index", "transformer", "vae", "sound"])
@pytest.mark.parametrize("value", ["2", 1.5, -1, {}, {"a": 1}, [{}], [-1], ["x", 5], [[2]], 10**9 * 4, [1] * 100])
def test_no_key_takes_these(checks, value):
    for key in checks:
        with pytest.raises(RunError, match=rf"^x.json: {key}: .* is not (a|true) "):
            check_types(Path("x.json"), {key: value}, checks)


@pytest.mark.parametrize(
    ("checks", "content"),
    [
        (INDEX, {"transformer": ["diffusers", "X"], "transformer_2": [None, None], "scheduler": None}),
        (TRANSFORMER, {"num_layers": 60, "num_single_layers": 0, "num_attention_heads": 1, "guidance_embeds": False}),
        (VAE, {"temperal_downsample": [False, True], "block_out_channels": [128, 256], "sampling_rate": 44100}),
        (SOUND, {"sample_size": 1024}),
        (LATENTS, {"latents_mean": [0, -1.5], "latents_std": [1, 2.0], "scaling_factor": 0.36, "shift_factor": None}),
    ],
)
def test_what_fits(checks, content):
    check_types(Path("x.json"), content, checks)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("transformer/config.json", {"num_layers": "2"}, "num_layers: '2' is not a whole number from 0"),
        ("transformer/config.json", {"num_attention_heads": 0}, "num_attention_heads: 0 is not a whole number from 1"),
        ("transformer/config.json", {"axes_dims_rope": [10**9]}, "axes_dims_rope: [1000000000] are more channels than"),
        ("vae/config.json", {"temperal_downsample": 5}, "temperal_downsample: 5 is not a list of true and false"),
        ("vae/config.json", {"block_out_channels": []}, "block_out_channels: [] is not a list of whole numbers from 1"),
        ("vae/config.json", {"latents_std": {}}, "latents_std: {} is not a list of finite numbers"),
        ("vae/config.json", {"latents_mean": ["x"]}, "latents_mean: ['x'] is not a list of finite numbers"),
        ("vae/config.json", {"scaling_factor": "x"}, "scaling_factor: 'x' is not a finite number"),
        ("model_index.json", {"scheduler": "x"}, "scheduler: 'x' is not a list of a library and a class"),
        ("model_index.json", {"transformer_2": [1, 2]}, "transformer_2: [1, 2] is not a list of a library and a class"),
    ],
)
def test_while_composing(tiny_folder, tmp_path, file, change, message):
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "checkpoint"))
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | change))
    with pytest.raises(RunError) as caught:
        tiny.config(folder)
    assert str(caught.value).startswith(f"{folder / file}: {message}")
