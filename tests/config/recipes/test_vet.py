"""Recipes choose options and set values. Anything that could run code or leave the folder is refused in one line."""

import os
import shlex
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image

from hydrarun.cli import main
from hydrarun.config.compose import compose_config, compose_unchecked
from hydrarun.config.recipes import search
from hydrarun.core import resources
from hydrarun.core.errors import UsageError
from hydrarun.outputs.quality.scenes import parse_caption

MARKER = "marker-of-executed-code"
TOUCH = f"touch {MARKER}"

# name: (content, part of the error message); each would create MARKER, or read or write elsewhere, if it were accepted
HOSTILE = {
    "os.system": (f"attention: {{_target_: os.system, command: {TOUCH}}}", "attention._target_"),
    "subprocess": (f"attention: {{_target_: subprocess.run, args: [{TOUCH}]}}", "attention._target_"),
    "eval": ("compile: {_target_: builtins.eval}", "compile._target_"),
    "torch.load": ("model: {scheduler: {_target_: torch.load, f: evil.pt, weights_only: false}}", "scheduler._target_"),
    "torch.hub.load": ("model: {scheduler: {_target_: torch.hub.load, repo_or_dir: a/b}}", "scheduler._target_"),
    "urllib": ("model: {scheduler: {_target_: urllib.request.urlretrieve}}", "scheduler._target_"),
    "logging.os.system": ("attention: {_target_: logging.os.system}", "attention._target_"),
    "an allowed target": (
        "attention: {_target_: hydrarun.models.layers.attention_backends.SDPA}",
        "attention._target_",
    ),
    "_partial_": ("attention: {_partial_: true}", "attention._partial_"),
    "_args_": (f"attention: {{_args_: [{TOUCH}]}}", "attention._args_"),
    "_recursive_": ("model: {guidance: {_recursive_: true}}", "model.guidance._recursive_"),
    "_convert_": ("model: {guidance: {_convert_: all}}", "model.guidance._convert_"),
    "nested in a list": ("model: {stages: [{x: [{_target_: os.system}]}]}", "model.stages.x._target_"),
    "nested in a dict": ("model: {facts: {a: {b: {_target_: os.system}}}}", "model.facts.a.b._target_"),
    "interpolated target": ("model: {facts: {t: os.system}, scheduler: '${model.facts}'}", "interpolations"),
    "interpolation": ("sampling: {height: '${sampling.width}'}", "interpolations"),
    "environment": ("model: {path: '${oc.env:HOME}'}", "interpolations and resolvers are not allowed"),
    "nested resolver": ("model: {path: '${oc.${x}:HOME}'}", "interpolations"),
    "resolver in a list": ("sampling: {seed: ['${oc.env:HOME}']}", "interpolations"),
    "callbacks": ("hydra: {callbacks: {x: {_target_: setuptools._distutils.spawn.spawn}}}", "'hydra' is not allowed"),
    "env_set": ("hydra: {job: {env_set: {PYTHONPATH: evil}}}", "'hydra' is not allowed"),
    "run.dir": ("hydra: {run: {dir: /tmp/elsewhere}}", "'hydra' is not allowed"),
    "job_logging": (f"hydra: {{job_logging: {{handlers: {{f: {{filename: {MARKER}}}}}}}}}", "'hydra' is not allowed"),
    "searchpath": ("hydra: {searchpath: [file:///tmp]}", "'hydra' is not allowed"),
    "launcher": ("hydra: {launcher: {_target_: os.system}}", "'hydra' is not allowed"),
    "dotted key": ("hydra.run.dir: /tmp/elsewhere", "'hydra.run.dir' is not allowed"),
    "sweeper group": ("defaults: [override hydra/sweeper: basic]", "defaults"),
    "launcher group": ("defaults: [override /hydra/launcher: basic]", "defaults"),
    "hydra group": ("defaults: [override /hydra: config]", "may not choose 'hydra'"),
    "another recipe": ("defaults: [override /recipe: ../../evil]", "may not choose 'recipe'"),
    "a file by a default": ("defaults: [../../tmp/evil]", "'../../tmp/evil' is not allowed"),
    "an added group": ("defaults: [/model: demo]", "is not allowed"),
    "an option elsewhere": ("defaults: [override /model: ../../../../../../tmp/evil]", "not the name of an option"),
    "an absolute option": ("defaults: [override /model: /tmp/evil]", "not the name of an option"),
    "an interpolated option": ("defaults: [override /model: '${oc.env:HOME}']", "not the name of an option"),
    "several options": ("defaults: [override /attention: [sdpa, flash]]", "not the name of an option"),
    "a group that is none": ("defaults: [override /cache/gate: mask]", "may not choose 'cache/gate'"),
    "a package": ("defaults: [override /model@hydra: demo]", "is not allowed"),
    "defaults as a mapping": ("defaults: {hydra/launcher: basic}", "defaults is not a list"),
    "package header": ("# @package hydra\nrun: {dir: /tmp/elsewhere}", "header '# @package hydra' is not allowed"),
    "other header": ("#@package hydra.run\ndir: x", "header"),
    "late header": ("sampling: {seed: 1}\n# @package foo", "header"),
    "trust_remote_code": ("model: {pipeline: {trust_remote_code: true}}", "trust_remote_code' is not allowed"),
    "custom_pipeline": ("model: {pipeline: {custom_pipeline: evil/repo}}", "custom_pipeline' is not allowed"),
    "python tag": (f"x: !!python/object/apply:os.system ['{TOUCH}']", "line 1: tags are not allowed"),
    "python name": ("x: !!python/name:os.system", "tags are not allowed"),
    "binary": ("model: {path: !!binary aGVsbG8=}", "tags are not allowed"),
    "set": ("model: {facts: !!set {a, b}}", "tags are not allowed"),
    "another folder for twins": ("report: {twins: /elsewhere}", "'report.twins' is not allowed"),
    "another folder for graphs": ("compile: {cache_dir: /elsewhere}", "'compile.cache_dir' is not allowed"),
    "any number of ranks": ("parallel: {max_ranks: 1000}", "'parallel.max_ranks' is not allowed: only the"),
    "alias bomb": (
        "a: &a [x,x,x]\n" + "".join(f"{c}: &{c} [{', '.join(4 * ['*' + p])}]\n" for p, c in pairwise("abcdefghi")),
        "line 2: aliases are not allowed",
    ),
    "merge key": ("a: &a {b: 1}\nc: {<<: *a}", "aliases are not allowed"),
    "huge": ("# " + "x" * 70_000, "larger than 64 KiB"),
    "deep": ("x: " + "[" * 20_000, "line 1: nested more than 32 levels deep"),
    "rather deep": (f"model: {{facts: {'{x: ' * 40}1{'}' * 40}}}", "line 1: nested more than 32 levels deep"),
    "digits": (f"sampling: {{seed: {'9' * 5000}}}", "not a number"),
    "hexadecimal digits": (f"sampling: {{seed: 0x{'f' * 5000}}}", "a number of too many digits"),
    "twice": ("sampling: {seed: 1}\nsampling: {seed: 2}", "'sampling' is set twice"),
    "not a mapping": ("- a\n- b", "not a mapping"),
    "not YAML": ("a: [", "line 1"),
    "number key": ("sampling: {1: 2}", "'sampling.1' is not allowed"),
    "two documents": ("a: 1\n---\nb: 2", "line 2"),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder: Path, content: str) -> str:
    (folder / "recipe.yaml").write_text(content, encoding="utf-8")
    return "recipe=./recipe.yaml"


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_recipe_is_refused_in_one_line_and_nothing_happens(name, folder, capsys, monkeypatch):
    content, words = HOSTILE[name]
    monkeypatch.setenv("PYTHONPATH", "before")
    override = write(folder, content)
    for argv in ([override], ["--cfg", "job", "--resolve", override], ["-m", override, "sampling.seed=1,2"]):
        assert main.main(argv) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.startswith("recipe ./recipe.yaml: ")
        assert len(error.splitlines()) == 1
    assert os.listdir(folder) == ["recipe.yaml"]  # no marker, no output directory, no log
    assert os.environ["PYTHONPATH"] == "before"


@pytest.mark.parametrize(
    "name", ["../../tmp/evil", "..", "/etc/passwd", "demo/../demo/quick", "demo", "config", "", "."]
)
def test_a_name_cannot_leave_the_folder_of_recipes(name, folder):
    (folder / "evil.yaml").write_text("sampling: {seed: 5}")
    with pytest.raises(UsageError, match=r"no such recipe|not the name of an option"):
        compose_config([f"recipe={name}"])


@pytest.mark.parametrize("name", ["./absent.yaml", "/dev/null.yaml", "folder.yaml"])
def test_a_path_must_be_a_file(name, folder):
    (folder / "folder.yaml").mkdir()
    with pytest.raises(UsageError, match=r"there is no such file|a folder, not a file"):
        compose_config([f"recipe={name}"])


def test_a_path_that_climbs_is_vetted_like_any_other(folder):
    """Hydra's own file source would load conf/../../anywhere without vetting it."""
    (folder / "evil.yaml").write_text("hydra: {run: {dir: /elsewhere}}")
    climb = os.path.relpath(folder / "evil.yaml", resources.find_folder("conf") / "recipe")
    with pytest.raises(UsageError, match=r"no such file|'hydra' is not allowed"):
        compose_config([f"recipe={climb}"])
    with pytest.raises(UsageError, match="'hydra' is not allowed"):
        compose_config([f"recipe=../{folder.name}/evil.yaml"])


def test_an_own_recipe_chooses_and_sets_and_the_command_line_wins(folder):
    override = write(
        folder,
        "# @package _global_\n"
        "defaults: [override /attention: flex, _self_]\n"
        "sampling: {num_inference_steps: 5, true_cfg_scale: 2e0, seed: [1, 2], height: 64}\n"
        "device: cpu\n",
    )
    config = compose_config([override, "sampling.height=96"])
    assert config["attention"]["_target_"].endswith("FlexAttention")
    sampling = config["sampling"]
    assert [sampling[key] for key in ("num_inference_steps", "true_cfg_scale", "seed", "height")] == [
        5,
        2.0,
        [1, 2],
        96,
    ]
    assert config["device"] == "cpu"
    assert compose_config([f"recipe={folder}/recipe.yaml"])["device"] == "cpu"
    assert compose_config([override, "attention=sdpa"])["attention"]["_target_"].endswith("SDPA")


def test_a_recipe_chooses_a_cache_and_its_predictor(folder):
    override = write(
        folder,
        "defaults: [override /cache: mask, override /cache/predictor: taylor, _self_]\n"
        "cache: {gate: {density: fast}, predictor: {order: 2}}\n",
    )
    cache = compose_config([override])["cache"]
    assert cache["gate"]["density"] == "fast"
    assert cache["predictor"] == {"_target_": "hydrarun.acceleration.cache.predictors.Taylor", "order": 2}


def test_prompts_in_a_recipe_are_text(folder):
    override = write(folder, "sampling:\n  prompt: ['a ${b} \\${c}', 'cost $5', 2020-01-01]\n  negative_prompt: '${'\n")
    sampling = compose_config([override])["sampling"]
    assert sampling["prompt"] == ["a ${b} \\${c}", "cost $5", "2020-01-01"]
    assert sampling["negative_prompt"] == "${"


@pytest.mark.parametrize("content", ["", "# only a comment\n", "{}", "sampling: {}"])
def test_an_empty_recipe_changes_nothing(content, folder):
    assert compose_config([write(folder, content)]) == compose_config([])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("sampling: {stpes: 3}", "sampling.stpes (recipe ./recipe.yaml): unknown key. Did you mean 'num_inference"),
        ("sampilng: {seed: 3}", "sampilng (recipe ./recipe.yaml): unknown key. Did you mean 'sampling'?"),
        ("sampling: {height: tall}", "sampling.height (recipe ./recipe.yaml): 'tall' is not a whole number"),
        ("sampling: {height: -8}", "sampling.height (recipe ./recipe.yaml): -8 is below 1"),
        ("defaults: [override /model: dmeo]", "model=dmeo (recipe ./recipe.yaml): no such option. Did you mean 'de"),
        ("defaults: [override /modle: demo]", "a recipe may not choose 'modle'. Did you mean 'model'?"),
        ("vae: {tiling: x}", "vae.tiling (recipe ./recipe.yaml): 'x' is not true or false"),
        ("sampling:", "sampling (recipe ./recipe.yaml): is empty (null): give it a value, or leave it out"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_recipe_names_the_file_and_the_nearest_name(content, message, folder, capsys):
    assert main.main([write(folder, content)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_bytes_that_are_not_text(folder):
    (folder / "recipe.yaml").write_bytes(b"sampling: {seed: 1} # \xff\xfe")
    with pytest.raises(UsageError, match="not UTF-8"):
        compose_config(["recipe=./recipe.yaml"])


def test_whose_weights_a_recipe_loads_is_told(folder):
    override = write(folder, "model: {path: someone/else}")
    config, origin = compose_unchecked([override])
    assert origin.notes(config) == ["recipe ./recipe.yaml loads weights from someone/else"]
    config, origin = compose_unchecked([override, "model.path=/mine"])
    assert origin.notes(config) == []


def shipped() -> list[str]:
    names = search.list_recipe_names()
    assert len(names) >= 3
    return names


@pytest.mark.parametrize("name", shipped())
def test_the_command_in_a_shipped_recipes_head_composes(name, tmp_path, monkeypatch):
    head = [
        line
        for line in search.find_recipe_file(name).read_text().splitlines()
        if line.startswith("#   python -m hydrarun")
    ]
    assert len(head) == 1
    words = shlex.split(head[0].removeprefix("#"))[3:]
    assert words[0] == f"recipe={name}"
    monkeypatch.chdir(tmp_path)
    for word in words:
        if word.startswith("input.images="):  # the user's own file
            Image.new("RGB", (64, 64)).save(word.partition("=")[2])
    compose_config(words)


@pytest.mark.parametrize("name", [name for name in search.list_recipe_names() if name.startswith("demo/")])
def test_the_demo_model_understands_the_prompts_of_its_recipes(name):
    prompts = compose_config([f"recipe={name}"])["sampling"]["prompt"]
    for prompt in prompts if isinstance(prompts, list) else [prompts]:
        parse_caption(prompt)


def test_no_recipe_is_picked_up_from_the_current_folder(folder):
    (folder / "recipes" / "demo").mkdir(parents=True)
    (folder / "recipes" / "demo" / "quick.yaml").write_text("sampling: {seed: 99}")
    assert compose_config(["recipe=demo/quick"])["sampling"]["seed"] == 0
