"""A checkpoint finds the model option that runs it, and says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hydrarun.cli import main
from hydrarun.config.compose import compose_config, compose_unchecked
from hydrarun.config.model_choice import SHAPES, choose_model, find_model_options, load_shapes
from hydrarun.core import resources
from hydrarun.core.errors import UsageError
from tests.helpers.subjects import CONFIGS, FAMILIES, VARIANTS

PUBLISHED = sorted(file.stem for file in SHAPES.glob("*.yaml"))


def save(folder: Path, index: dict, transformer: dict) -> Path:
    """Write the two files that tell what a checkpoint is."""
    (folder / "transformer").mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "transformer" / "config.json").write_text(json.dumps(transformer))
    return folder


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_checkpoint_finds_its_own_option(name):
    shapes = load_shapes(name)
    found = find_model_options(shapes["model_index"], shapes["transformer"])
    assert CONFIGS[found[0]]["model"]["facts"].get("shapes") == name
    assert found[0] not in VARIANTS or name in VARIANTS


@pytest.mark.sample(5)
@pytest.mark.parametrize("subject", FAMILIES, indirect=True)
def test_a_saved_pipeline_finds_an_option_of_its_family(subject):
    """Tiny sizes are nearest to the smallest of the options that share a pipeline."""
    index, transformer = (
        json.loads((subject.folder / name).read_text()) for name in ("model_index.json", "transformer/config.json")
    )
    found = find_model_options(index, transformer)
    assert subject.name in found
    same = CONFIGS[subject.name]["model"]
    assert {CONFIGS[name]["model"]["pipeline"]["_target_"] for name in found} == {same["pipeline"]["_target_"]}
    assert {CONFIGS[name]["model"]["experts"] for name in found} == {same["experts"]}


def test_the_shipped_weights_are_the_demo():
    folder = resources.find_folder("weights") / "demo"
    assert choose_model([f"model.path={folder}"])[-1] == "model=demo"


def test_it_is_taken_and_said_once(tmp_path, capsys):
    folder = save(tmp_path / "a b", load_shapes("qwen_image")["model_index"], load_shapes("qwen_image")["transformer"])
    words = [f'model.path="{folder}"']
    for _ in range(2):
        assert compose_unchecked(words)[0]["model"]["name"] == "qwen_image"
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"model=qwen_image: chosen for {folder}, a checkpoint of QwenImagePipeline;"
        " model=qwen_image_2512, demo would fit too"
    )


@pytest.mark.parametrize("more", [["model=flux_dev"], ["recipe=demo/quick"]])
def test_what_names_a_model_decides(more, tmp_path, capsys):
    words = [f"model.path={save(tmp_path / 'x', load_shapes('zimage')['model_index'], {})}", *more]
    assert choose_model(words) == words
    assert choose_model([*more]) == more
    assert capsys.readouterr().err == ""


def test_another_models_checkpoint_is_named_with_its_option(tmp_path):
    folder = save(
        tmp_path / "x", load_shapes("flux_schnell")["model_index"], load_shapes("flux_schnell")["transformer"]
    )
    with pytest.raises(UsageError) as raised:
        compose_config([f"model.path={folder}", "model=qwen_image", "sampling.prompt=a"])
    assert str(raised.value) == (
        f"model.path={folder}: model=qwen_image does not run a checkpoint of FluxPipeline: use model=flux_schnell"
    )


def test_what_no_model_runs(tmp_path, capsys):
    folder = save(tmp_path / "x", {"_class_name": "StableDiffusionPipeline"}, {})
    assert main.main([f"model.path={folder}"]) == 2
    assert capsys.readouterr().err == (
        f"model.path={folder}: a checkpoint of StableDiffusionPipeline, which no model runs:"
        " `hydrarun list` shows them\n"
    )


@pytest.mark.parametrize(
    "content", [[], {}, {"_class_name": 5}, {"_class_name": "QwenImagePipeline", "transformer_2": 5}]
)
def test_a_damaged_index_is_one_line(tmp_path, capsys, content):
    folder = save(tmp_path / "x", content, {"num_layers": {}})
    assert main.main([f"model.path={folder}", f"hydra.run.dir={tmp_path / 'run'}"]) in (1, 2)
    assert "Traceback" not in capsys.readouterr().err


def test_a_sweep_takes_it_too(tmp_path, capsys):
    folder = resources.find_folder("weights") / "demo"
    assert main.main(["-m", "--dry-run", f"model.path={folder}", "sampling.seed=1,2"]) == 0
    said = capsys.readouterr()
    assert "model=demo: chosen for" in said.err or "model=demo" in said.out
