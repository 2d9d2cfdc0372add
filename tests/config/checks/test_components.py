"""What a checkpoint's JSON files must not hold: keys that run code, and numbers that no model has."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from hydrarun.config.checks.components import check_component_files
from hydrarun.config.compose import compose_config
from hydrarun.core.errors import UsageError
from hydrarun.core.progress import Progress
from hydrarun.engine.build import build_pipeline
from hydrarun.engine.plan.configs import read_folder_configs
from tests.helpers import tiny


@pytest.fixture
def write(tmp_path):
    def write(name: str, content: object) -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
        return path

    return write


def test_common_configs_pass(write, tmp_path, demo_folder):
    write("text_encoder/config.json", {"_attn_implementation_autoset": True, "attn_implementation": None, "depth": 32})
    write("tokenizer/tokenizer_config.json", {"model_max_length": 1000000000000000019884624838656})
    write("scheduler/scheduler_config.json", {"num_train_timesteps": 1000, "lambda_min_clipped": -float("inf")})
    write("vae/config.json", {"layers_per_block": [2, 2]})
    check_component_files(tmp_path)
    check_component_files(demo_folder)


@pytest.mark.parametrize(
    ("name", "content", "key"),
    [
        ("text_encoder/config.json", {"attn_implementation": "evil/kernel"}, "attn_implementation"),
        ("text_encoder/config.json", {"_attn_implementation": "flash_attention_2"}, "_attn_implementation"),
        ("vae/config.json", {"attn_implementation_internal": "evil/kernel"}, "attn_implementation_internal"),
        ("a/config.json", {"_attn_implementation_internal": "evil/kernel"}, "_attn_implementation_internal"),
        (
            "text_encoder/config.json",
            {"text_config": {"more": [{"attn_implementation": {"": "evil/kernel@main:f"}}]}},
            "text_config.more[0].attn_implementation",
        ),
        ("text_encoder/config.4.0.0.json", {"attn_implementation": "evil/kernel"}, "attn_implementation"),
        ("text_encoder/generation_config.json", {"custom_generate": "evil/generate"}, "custom_generate"),
        ("tokenizer/tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["x.X", None]}}, "auto_map"),
        ("processor/preprocessor_config.json", {"auto_map": {"AutoImageProcessor": "x.X"}}, "auto_map"),
        ("model_index.json", {"vision": {"auto_map": {}}}, "vision.auto_map"),
    ],
)
def test_a_key_that_names_code_is_refused_at_any_depth(write, tmp_path, name, content, key):
    path = write(name, content)
    with pytest.raises(UsageError) as caught:
        check_component_files(tmp_path)
    said = "is not allowed: it names code that would be run with the checkpoint. Remove it"
    assert str(caught.value) == f"{path}: {key} {said}"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("transformer/config.json", {"num_layers": 10**12}, "num_layers: 1000000000000 is above 10000."),
        ("transformer/config.json", {"num_single_layers": -1}, "num_single_layers: -1 is below 0."),
        ("transformer/config.json", {"n_refiner_layers": 10**9}, "n_refiner_layers: 1000000000 is above 10000."),
        ("te/config.json", {"vision_config": {"depth": 10**9}}, "vision_config.depth: 1000000000 is above 10000."),
        ("te/config.json", {"num_hidden_layers": 10**9}, "num_hidden_layers: 1000000000 is above 10000."),
        ("vae/config.json", {"layers_per_block": [2, 10**9]}, "layers_per_block: 1000000000 is above 10000."),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 0}, "num_train_timesteps: 0 is below 1."),
        ("s/scheduler_config.json", {"num_train_timesteps": 10**12}, "1000000000000 is above 1000000."),
    ],
)
def test_a_number_that_no_model_has_is_refused(write, tmp_path, name, content, message):
    path = write(name, content)
    with pytest.raises(UsageError) as caught:
        check_component_files(tmp_path)
    assert str(caught.value).startswith(f"{path}: ")
    assert str(caught.value).endswith(message)


def test_runs_plans_and_builds_refuse_before_they_read_weights(tiny_folder, tmp_path, monkeypatch):
    """Composing checks a folder; building checks what was downloaded meanwhile."""
    tiny_copy = Path(shutil.copytree(tiny_folder, tmp_path / "tiny"))
    config = tiny.config(tiny_copy)
    path = tiny_copy / "text_encoder" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "attn_implementation": "evil/kernel"}))
    monkeypatch.setattr("hydrarun.engine.build.load_pipeline", None)
    for read in (
        lambda: compose_config([f"model.path={tiny_copy}", "sampling.prompt=a"]),
        lambda: read_folder_configs(tiny_copy),
        lambda: build_pipeline(config, Progress(quiet=True), "cpu"),
    ):
        with pytest.raises(UsageError, match="attn_implementation is not allowed"):
            read()
