"""The verb `recipe`: list, run an untrusted recipe, collections, and the schema for editors."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from hydrarun.cli import main
from hydrarun.cli.commands import list as listing
from hydrarun.cli.commands.plan import fill_prompt
from hydrarun.cli.recipe import json_schema
from hydrarun.config.checks import compatibility
from hydrarun.config.compose import compose_config, compose_unchecked
from hydrarun.config.recipes import search
from hydrarun.config.recipes.yaml_loader import parse_sections
from hydrarun.core import resources
from hydrarun.core.errors import UsageError
from hydrarun.core.tables import format_plain
from hydrarun.engine.plan import planner, suggest
from hydrarun.engine.plan.devices import read_devices


@pytest.fixture
def started(monkeypatch, tmp_path) -> list[list[str]]:
    """The overrides that reached `run_overrides`; the current folder is empty."""
    seen: list[list[str]] = []
    monkeypatch.setattr("hydrarun.cli.commands.run.run_overrides", lambda overrides, flags: seen.append(overrides) or 0)
    monkeypatch.chdir(tmp_path)
    return seen


@pytest.fixture
def sent(started, tmp_path) -> Path:
    """A folder from somebody else: a recipe and an input image."""
    folder = tmp_path / "a, (b)"
    folder.mkdir()
    Image.new("RGB", (64, 64), "red").save(folder / "in.png")
    (folder / "edit.yaml").write_text(
        "about: {description: A red cat., author: Ann}\n"
        "defaults: [override /model: qwen_image_edit, override /cache: every_n]\n"
        "input: {images: in.png}\nsampling: {prompt: a cat, seed: [1, 2], num_inference_steps: 8}\n"
    )
    return folder


def terminal(monkeypatch, answer: str) -> None:
    stdin = io.StringIO(answer)
    stdin.isatty = lambda: True
    monkeypatch.setattr(sys, "stdin", stdin)


def test_it_shows_what_it_will_do(sent, started, capsys):
    assert main.main(["recipe", "run", str(sent), "--yes", "hydra.run.dir=there"]) == 0
    shown = capsys.readouterr().err.splitlines()
    assert shown == [
        f"recipe {sent}/edit.yaml: A red cat.",
        "  by Ann",
        "  model    qwen_image_edit, weights Qwen/Qwen-Image-Edit, to be DOWNLOADED from the hub"
        " (a transformer of 20.4B parameters)",
        "  draws    2 pictures, the size of the input image, 8 steps",
        "  sets     model=qwen_image_edit",
        "  sets     cache=every_n",
        f"  sets     input.images={sent}/in.png",
        "  sets     sampling.prompt=a cat",
        "  sets     sampling.seed=[1, 2]",
        "  sets     sampling.num_inference_steps=8",
        f"  reads    {sent}/in.png",
        "  writes   there",
        "  status   unverified: it brings no evidence",
    ]
    assert started == [[f'recipe="{sent}/edit.yaml"', "hydra.run.dir=there"]]
    assert compose_config(started[0][:1])["input"]["images"] == f"{sent}/in.png"


def test_the_evidence_is_shown_as_its_own_word(started, capsys):
    file = search.find_recipe_file("demo/quick")
    assert main.main(["recipe", "run", str(file), "--yes"]) == 0
    status = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(
        r"  status   verified; on \S+ with .+, as the recipe states; took \S+ s and \S+ GiB on .+", status
    )


@pytest.mark.parametrize(("answer", "code"), [("y\n", 0), ("YES\n", 0), ("n\n", 1), ("\n", 1), ("", 1), ("ja\n", 1)])
def test_it_asks_on_a_terminal(answer, code, sent, started, capsys, monkeypatch):
    terminal(monkeypatch, answer)
    assert main.main(["recipe", "run", str(sent / "edit.yaml")]) == code
    assert "run this? [y/N] " in capsys.readouterr().err
    assert len(started) == (code == 0)


def test_without_a_terminal_it_says_how(sent, started, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    assert main.main(["recipe", "run", str(sent)]) == 2
    error = capsys.readouterr().err
    assert "draws    2 pictures" in error
    assert "add --yes to run it; there is no terminal to ask on" in error
    assert not started


def test_the_command_line_wins_and_texts_are_texts(sent, started, capsys):
    assert main.main(["recipe", "run", str(sent), "sampling.prompt=a, b", "sampling.seed=3", "--yes"]) == 0
    assert "draws    1 picture," in capsys.readouterr().err
    assert started[0][1:] == ['sampling.prompt="a, b"', "sampling.seed=3"]


def test_a_folder_must_hold_one_recipe(sent, started, capsys):
    (sent / "other.yaml").write_text("device: cpu\n")
    (sent / "empty").mkdir()
    (sent / "link").mkdir()
    (sent / "link" / "r.yaml").symlink_to("/etc/hostname")
    for word, said in (
        (sent, "holds 2 files that end in .yaml: edit.yaml, other.yaml; give the path of one"),
        (sent / "empty", "holds no files that end in .yaml."),
        (sent / "link", "r.yaml is a link; give the path of the file itself"),
        (sent / "in.png", "in.png: not a file that ends in .yaml, nor a folder"),
        ("absent.yaml", "absent.yaml: not a file that ends in .yaml"),
    ):
        assert main.main(["recipe", "run", str(word), "--yes"]) == 2
        assert said in capsys.readouterr().err
    assert not started


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["recipe", "exprot", "x"], "recipe exprot: no such verb. Did you mean 'export'?"),
        (["recipe", "run"], "recipe run takes one file."),
        (["recipe", "run", "a.yaml", "b.yaml"], "recipe run takes one file."),
        (["recipe", "run", "a.yaml", "-m"], "recipe run: -m: no such flag; it takes --yes."),
        (["recipe", "export"], "recipe export takes a folder, and a file to write."),
        (["recipe", "export", "x", "y.yml"], "y.yml: the name of a recipe ends in .yaml."),
        (["recipe", "verify", "demo/quikc"], "recipe=demo/quikc: no such recipe. Did you mean 'demo/quick'?"),
        (["recipe", "schema", "x"], "recipe schema: x: it takes no arguments."),
        (["recipe", "list", "demo"], "recipe list: demo: it takes hydra.searchpath=[DIR] and --json."),
    ],
)
def test_mistakes(words, said, capsys, started):
    assert main.main(words) == 2
    assert said in capsys.readouterr().err


def test_usage(capsys):
    assert main.main(["recipe", "--help"]) == 0
    assert "usage: hydrarun recipe list" in capsys.readouterr().out
    assert main.main(["recipe"]) == 2


@pytest.mark.parametrize("words", [["list"], ["schema"], ["run", "r.yaml"]])
def test_nothing_heavy_is_imported(words, tmp_path):
    (tmp_path / "r.yaml").write_text("sampling: {stpes: 3}\n")
    code = (
        "import sys; from hydrarun.cli import main as cli; code = cli.main(); "
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy', 'PIL', 'huggingface_hub'} & set(sys.modules); "
        "sys.exit(f'{heavy} {code}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, "recipe", *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


# --- the list, and collections ---------------------------------------------------------------------------------------


def test_the_list(capsys):
    assert main.main(["recipe", "list", "--json"]) == 0
    entries = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert list(entries) == search.list_recipe_names()
    assert entries["demo/quick"]["model"] == "demo"
    assert entries["demo/quick"]["status"] == "verified"
    assert entries["qwen_image/rtx4090"]["status"] == "unverified"
    assert entries["qwen_image/rtx4090"]["hardware"] is None
    main.main(["recipe", "list"])
    assert capsys.readouterr().out == format_plain(listing.make_table("recipes")) + "\n"


@pytest.fixture
def collection(tmp_path) -> Iterator[Path]:
    """A folder with an option, a recipe that chooses it, and files that must be refused or ignored."""
    for name, text in {
        "attention/ours.yaml": "_target_: hydrarun.models.layers.attention_backends.SDPA\n",
        "recipes/team/fast.yaml": "about: {description: Ours.}\n"
        "defaults: [override /attention: ours]\nsampling: {seed: 9}\n",
        "recipes/team/evil.yaml": "hydra: {run: {dir: /elsewhere}}\n",
        "recipes/demo/quick.yaml": "sampling: {seed: 9}\n",
        "recipe/unvetted.yaml": "sampling: {seed: 9}\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    yield tmp_path
    search.set_collections([])


@pytest.mark.parametrize("scheme", ["file://", ""])
def test_a_collection_brings_options_and_vetted_recipes(scheme, collection):
    where = f"hydra.searchpath=[{scheme}{collection}]"
    config = compose_config([where, "recipe=team/fast"])
    assert config["sampling"]["seed"] == 9
    assert compose_config([where, "attention=ours"])["attention"] == {
        "_target_": "hydrarun.models.layers.attention_backends.SDPA"
    }
    for recipe, said in (
        ("team/evil", "recipe team/evil: 'hydra' is not allowed"),
        ("unvetted", "recipe=unvetted: no such recipe."),
        ("demo/quick", "recipe=demo/quick: in several places"),
    ):
        with pytest.raises(UsageError, match=re.escape(said)):
            compose_config([where, f"recipe={recipe}"])
    with pytest.raises(UsageError, match="no such recipe"):  # a collection is not kept for later compositions
        compose_config(["recipe=team/fast"])


def test_a_collection_is_listed(collection, capsys):
    assert main.main(["recipe", "list", f"hydra.searchpath=[file://{collection}]", "--json"]) == 0
    entries = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert entries["team/fast"]["description"] == "Ours."
    assert entries["team/evil"]["status"].startswith("refused: recipe team/evil: 'hydra' is not allowed")
    assert main.main(["recipe", "list", "--json"]) == 0
    assert "team/fast" not in capsys.readouterr().out


def test_a_collections_recipe_runs(collection, tmp_path, capsys):
    words = [f"hydra.searchpath=[file://{collection}]", "recipe=team/fast", "--cfg", "job"]
    assert main.main(words) == 0
    assert yaml.safe_load(capsys.readouterr().out)["sampling"]["seed"] == 9


# --- the schema, and the shipped recipes -----------------------------------------------------------------------------


def faults(value: Any, schema: dict[str, Any], path: str = "") -> list[str]:
    """Return where a value violates a JSON schema, for the schema keywords that ours uses."""
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool}
    named = schema.get("type", [])
    named = [named] if isinstance(named, str) else named
    right = any(
        value is None
        if kind == "null"
        else isinstance(value, kinds[kind]) and (kind == "boolean") == isinstance(value, bool)
        for kind in named
    )
    if named and not right:
        return [f"{path} is no {named}"]
    if ("const" in schema and value != schema["const"]) or ("enum" in schema and value not in schema["enum"]):
        return [f"{path} is {value!r}"]
    if "anyOf" in schema and all(faults(value, one, path) for one in schema["anyOf"]):
        return [f"{path} is none of the choices"]
    found = []
    if isinstance(value, list):
        found += [fault for one in value for fault in faults(one, schema.get("items", {}), f"{path}[]")]
    if isinstance(value, dict):
        found += [f"{path} lacks {key}" for key in schema.get("required", ()) if key not in value]
        other = schema.get("additionalProperties", True)
        for key, child in value.items():
            if key in schema.get("properties", {}):
                found += faults(child, schema["properties"][key], f"{path}.{key}")
            elif other is False:
                found.append(f"{path}.{key} is unknown")
            elif isinstance(other, dict):
                found += faults(child, other, f"{path}.{key}")
    return found


def test_the_shipped_schema_is_current(capsys):
    shipped = (resources.find_folder("recipes") / "schema.json").read_text(encoding="utf-8")
    assert shipped == json_schema.format_schema(), "run `make golden` and look at the diff"
    main.main(["recipe", "schema"])
    assert capsys.readouterr().out == shipped


def test_the_schema_says_what_conf_says():
    properties = json_schema.make_schema()["properties"]
    assert properties["sampling"]["properties"]["seed"]["description"].startswith("whole number >= 0")
    assert properties["sampling"]["properties"]["height"]["type"] == ["integer", "null"]
    assert properties["parallel"]["properties"]["ulysses_degree"]["description"].startswith("tokens are split")
    assert properties["cache"]["properties"]["gate"]["properties"]["threshold"]["description"]
    assert properties["cache"]["properties"]["predictor"]["properties"]["order"]["description"].startswith("1: a line")
    assert properties["dtype"]["description"].startswith("dtype of the comp")
    assert "twins" not in properties["report"]["properties"]
    assert "hydra" not in properties


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ({"samplign": {}}, ".samplign is unknown"),
        ({"sampling": {"height": "tall"}}, ".sampling.height is no ['integer', 'null']"),
        ({"sampling": {"stpes": 3}}, ".sampling.stpes is unknown"),
        ({"defaults": [{"override /model": "dmeo"}]}, ".defaults[] is none of the choices"),
        ({"vae": {"tiling": 1}}, ".vae.tiling is no ['boolean']"),
        ({"report": {"twins": "x"}}, ".report.twins is unknown"),
        ({"about": {"descripton": "x"}}, ".about.descripton is unknown"),
    ],
)
def test_the_schema_finds_mistakes(content, fault):
    assert fault in faults(content, json_schema.make_schema())


@pytest.mark.parametrize("name", search.list_recipe_names())
def test_a_shipped_recipe_suits_the_schema_and_names_it(name):
    data = search.find_recipe_file(name).read_bytes()
    assert data.startswith(b"# yaml-language-server: $schema=../schema.json\n")
    assert faults(parse_sections(data)[1], json_schema.make_schema()) == []
    recipe = search.load_recipe(name)
    assert recipe.about.description.endswith(".")
    assert recipe.status == ("verified" if name.startswith("demo/") else "unverified")
    if recipe.evidence:
        assert search.find_recipe_file(name).with_name(recipe.evidence.measured.sample).is_file()
        assert recipe.evidence.measured.quality["accuracy"]["outputs"] == 1


def test_there_are_recipes_for_a_cpu_and_for_gpus():
    models = [search.load_recipe(name).model for name in search.list_recipe_names()]
    assert models.count("demo") >= 3
    assert {"qwen_image", "flux_dev", "flux_schnell", "wan22_t2v_a14b"} <= set(models)


def plan_of(name: str) -> list[str]:
    """Return the overrides of the `hydrarun plan` line at the head of a GPU recipe."""
    (line,) = re.findall(r"^# It fits: hydrarun plan (.*)$", search.find_recipe_file(name).read_text(), re.MULTILINE)
    return line.split()


def on_gpus() -> list[str]:
    """Return the GPU recipes whose models can be planned before they are downloaded."""
    composed = {name: compose_unchecked([f"recipe={name}"])[0]["model"] for name in search.list_recipe_names()}
    return [name for name, model in composed.items() if model["name"] != "demo" and "shapes" in model["facts"]]


@pytest.mark.sample(4)
@pytest.mark.parametrize("name", on_gpus())
def test_a_gpu_recipe_names_a_device_that_it_fits(name, monkeypatch):
    """For each model, only the recipe that needs the largest share of its device is planned here, to save time."""
    overrides = plan_of(name)
    assert overrides[0] == f"recipe={name}"
    config = fill_prompt(compose_unchecked(overrides)[0])
    compatibility.check_compatibility(config)
    assert config["plan"]["device"] in read_devices()
    if name.endswith(("square", "dbcache", "schnell/rtx4090", "h100")):
        # the search for suggestions takes most of the time
        monkeypatch.setattr(suggest, "find_suggestions", lambda *_: [None] * 3)
        assert planner.make_plan(config).fits
