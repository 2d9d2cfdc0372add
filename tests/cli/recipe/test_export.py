"""`recipe export` writes a finished run as the smallest recipe that composes to it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hydrarun.cli import main
from hydrarun.cli.recipe import minimal, pixel_digest
from hydrarun.config.compose import compose_config, compose_unchecked
from hydrarun.config.recipes import search
from hydrarun.config.type_check import format_value
from hydrarun.outputs.provenance import keep_pixel_settings
from tests.helpers.undrawn import draw

CASES = {
    (): {"defaults": ["model=demo"]},
    ("sampling.seed=4", "device=cpu"): {"defaults": ["model=demo"], "sampling": {"seed": 4}, "device": "cpu"},
    ("cache=teacache", "cache.gate.threshold=0.1"): {
        "defaults": ["model=demo", "cache=teacache"],
        "cache": {"gate": {"threshold": 0.1}},
    },
    ("cache=mask", "cache/predictor=taylor", "cache.predictor.order=2", "cache.gate.steps=[0,1,5]"): {
        "defaults": ["model=demo", "cache=mask", "cache/predictor=taylor"],
        "cache": {"predictor": {"order": 2}, "gate": {"steps": [0, 1, 5]}},
    },
    ("cache=dbcache_taylorseer",): {"defaults": ["model=demo", "cache=dbcache_taylorseer"]},
    ("parallel.ulysses_degree=4", "parallel.cfg_degree=2"): {
        "defaults": ["model=demo", "parallel=cfg2"],
        "parallel": {"ulysses_degree": 4},
    },
    ("compile=blocks", "compile.cache_dir=/data/x", "warmup=2", "report.metrics=[psnr]"): {
        "defaults": ["model=demo", "compile=blocks"]
    },
    (
        "model=wan22_t2v_a14b",
        "output.format=frames",
        "sampling.prompt=1e3",
        "sampling.num_frames=5",
        "vae.tiling=true",
    ): {
        "defaults": ["model=wan22_t2v_a14b"],
        "sampling": {"prompt": "1e3", "num_frames": 5},
        "vae": {"tiling": True},
        "output": {"format": "frames"},
    },
    (
        "model=flux_dev",
        "quantization=int8_weight_only",
        "offload=layerwise",
        "sampling.prompt=${x}, a",
        "model.revision=abc",
    ): {
        "defaults": ["model=flux_dev", "quantization=int8_weight_only", "offload=layerwise"],
        "model": {"revision": "abc"},
        "sampling": {"prompt": "${x}, a"},
    },
}


def words(content: dict) -> dict:
    """Return the content with its defaults as a sorted list of `group=option`."""
    chosen = [
        f"{key.removeprefix('override /')}={name}" for entry in content["defaults"] for key, name in entry.items()
    ]
    return {**content, "defaults": sorted(chosen)}


@pytest.mark.sample(4)
@pytest.mark.parametrize("overrides", CASES)
def test_only_what_differs_from_the_defaults_is_said(overrides):
    assert words(minimal.make_minimal_recipe(compose_config(overrides))) == {
        **CASES[overrides],
        "defaults": sorted(CASES[overrides]["defaults"]),
    }


@pytest.mark.sample(4)
@pytest.mark.parametrize("name", search.list_recipe_names())
def test_a_shipped_recipe_is_as_small_as_can_be(name, tmp_path):
    """The configuration of a shipped recipe minimizes to the same recipe, plus values that the recipe leaves open."""
    wanted = {"sampling": {"prompt": "x"}} if name == "qwen_image/square" else {}  # it leaves the prompt open
    raw = compose_unchecked([f"recipe={name}"])[0]
    if raw["model"]["input_images"][0]:
        wanted = {"input": {"images": [str(tmp_path / "a.png")]}}
        Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    given = [
        f"{group}.{key}={format_value(value)}" for group, values in wanted.items() for key, value in values.items()
    ]
    config = compose_config([f"recipe={name}", *given])
    assert words(minimal.make_minimal_recipe(config)) == words({**search.load_recipe(name).content, **wanted})


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "model.scheduler={_target_: diffusers.FlowMatchHeunDiscreteScheduler}",
            "model.scheduler._target_ is diffusers",
        ),
        ("model.name=mine", "the model 'mine' is not a shipped option"),
        ("model.facts.licence=x", ""),  # facts of a model do not change pixels
        ("model.judge=null", ""),
    ],
)
def test_what_a_recipe_cannot_say(override, said):
    config = compose_config([override])
    if not said:
        assert words(minimal.make_minimal_recipe(config)) == {"defaults": ["model=demo"]}
        return
    with pytest.raises(minimal.InexpressibleError) as caught:
        minimal.make_minimal_recipe(config)
    assert said in str(caught.value)


def test_a_class_of_ones_own_is_named():
    config = compose_config([])
    config["attention"] = {"_target_": "my_module.Attention"}
    with pytest.raises(minimal.InexpressibleError, match=r"its attention is a my_module.Attention, which no shipped"):
        minimal.make_minimal_recipe(config)


# --- files -----------------------------------------------------------------------------------------------------------


def test_the_recipe_composes_to_the_run_and_carries_its_evidence(run_dir, capsys):
    assert main.main(["recipe", "export", "run", "shared/fast.yaml"]) == 0
    assert (
        "shared/fast.yaml, and next to it fast.webp\nnot verified yet; run: hydrarun recipe verify"
        in capsys.readouterr().out
    )
    recipe = search.load_recipe("shared/fast.yaml")
    record = json.loads((run_dir / "run.json").read_text())
    wanted = {**record["config"], "device": "cpu", "dtype": "float32"}
    assert keep_pixel_settings(compose_config(["recipe=shared/fast.yaml"])) == keep_pixel_settings(wanted)
    assert recipe.content["cache"] == {"gate": {"density": "fast"}}
    assert (recipe.status, recipe.genuine) == ("unverified", True)
    measured, (output,) = recipe.evidence.measured, record["outputs"]
    assert measured.outputs[0].pixels_sha256 == output["pixels_sha256"]
    assert (measured.timings.first_step_s, measured.timings.step_s, measured.timings.total_s) == (0.4, 0.15, 2.0)
    assert (measured.weights.path, measured.sample) == ("package:demo", "fast.webp")
    assert measured.outputs[0].fingerprint == pixel_digest.compute_fingerprint(
        np.asarray(Image.open(run_dir / output["path"]))
    )
    assert Image.open("shared/fast.webp").size == (128, 128)
    assert recipe.about.description == "demo: 1 picture, 128x128, 8 steps"


def test_it_goes_beside_the_run_unless_it_is_told_otherwise_and_overwrites_nothing(run_dir, capsys):
    assert main.main(["recipe", "export", "run"]) == 0
    before = (run_dir / "recipe.yaml").read_bytes()
    assert main.main(["recipe", "export", "run"]) == 2
    assert "run/recipe.yaml exists; choose another" in capsys.readouterr().err
    assert (run_dir / "recipe.yaml").read_bytes() == before


def test_a_place_that_cannot_be_written(run_dir, capsys):
    Path("file").touch()
    assert main.main(["recipe", "export", "run", "file/in/r.yaml"]) == 2
    assert capsys.readouterr().err == "recipe export: file/in/r.yaml cannot be written: Not a directory.\n"


def test_no_secret_and_no_place_of_the_machine_gets_into_it(run_dir, tmp_path, monkeypatch, capsys):
    home = tmp_path / "home" / "ann"
    (home / "weights").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    config = compose_config(["model=qwen_image", "sampling.prompt=x", "compile=blocks", f"compile.cache_dir={home}/c"])
    config["model"]["path"] = str(home / "weights")
    draw(config, tmp_path / "local")
    assert main.main(["recipe", "export", "local", "r.yaml"]) == 0
    text = Path("r.yaml").read_text()
    assert "ann" not in text
    assert "~" not in text
    assert "path:" not in text
    assert "the run's weights are a folder, which the recipe does not name" in capsys.readouterr().out
    assert search.load_recipe("r.yaml").evidence.measured.weights.fingerprint == "930362e098623e17"


def edit(tmp_path: Path) -> tuple[dict, Path, tuple[dict, ...]]:
    """Return a configuration with two input images, their files and their recorded facts."""
    files = [tmp_path / name for name in ("a b.png", "ü.JPG")]
    for file, colour in zip(files, ("red", "blue"), strict=True):
        Image.new("RGB", (64, 64), colour).save(file)
    listed = ", ".join(str(file) for file in files)
    config = compose_config(["model=qwen_image_edit_plus", "sampling.prompt=x", f"input.images=[{listed}]"])
    inputs = [
        {"path": str(file), "sha256": hashlib.sha256(file.read_bytes()).hexdigest(), "width": 64, "height": 64}
        for file in files
    ]
    return config, files, tuple(inputs)


def test_input_images_go_with_it(run_dir, tmp_path):
    config, files, inputs = edit(tmp_path)
    draw(config, tmp_path / "edited", inputs)
    assert main.main(["recipe", "export", "edited", "shared/e.yaml"]) == 0
    assert search.load_recipe("shared/e.yaml").whole["input"] == {"images": ["e-input-0.png", "e-input-1.jpg"]}
    assert Path("shared/e-input-1.jpg").read_bytes() == files[1].read_bytes()
    given = compose_config(["recipe=shared/e.yaml"])["input"]["images"]
    assert given == [str(tmp_path / "shared" / name) for name in ("e-input-0.png", "e-input-1.jpg")]
    assert search.load_recipe("shared/e.yaml").evidence.measured.inputs == [image["sha256"] for image in inputs]


def test_an_image_that_is_another_now(run_dir, tmp_path, capsys):
    config, files, inputs = edit(tmp_path)
    draw(config, tmp_path / "edited", inputs)
    Image.new("RGB", (64, 64), "green").save(files[0])
    assert main.main(["recipe", "export", "edited", "e.yaml"]) == 2
    assert "a b.png was changed since the run" in capsys.readouterr().err
    assert not list(tmp_path.glob("e*.yaml"))


def changed(run_dir: Path, **values) -> None:
    record = json.loads((run_dir / "run.json").read_text())
    (run_dir / "run.json").write_text(json.dumps({**record, **values}))


def repainted(run_dir: Path) -> None:
    Image.new("RGB", (128, 128), "red").save(next(run_dir.glob("*.png")))


def as_a_sweep(run_dir: Path) -> None:
    run_dir.rename("point")
    run_dir.mkdir()
    Path("point").rename(run_dir / "0")


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        (lambda run: changed(run, status="failed"), 2, "the run did not finish (status 'failed')"),
        (lambda run: (run / "run.json").rename(run.parent / "x"), 2, "holds no run.json; give the folder of a"),
        (as_a_sweep, 2, "a sweep of 1 runs; give the folder of one: run/0"),
        (lambda run: changed(run, format=9), 2, "its format is 9"),
        (lambda run: changed(run, config=None), 2, "run.json holds no configuration"),
        (lambda run: changed(run, timings={}), 1, "its run.json is incomplete"),
        (lambda run: changed(run, hardware=5), 1, "run.json.hardware: 5 is not a mapping"),
        (repainted, 1, "its pixels differ from those that the run drew"),
        (lambda run: changed(run, device=None), 1, "run.json.device: null is not text"),
        (lambda run: next(run.glob("*.png")).unlink(), 2, "No such file"),
    ],
)  # fmt: skip
def test_a_run_of_which_there_is_no_recipe(change, code, said, run_dir, capsys):
    change(run_dir)
    assert main.main(["recipe", "export", "run", "r.yaml"]) == code
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1
    assert not list(Path().glob("r.*"))


def test_a_hostile_run_json_is_refused(run_dir, capsys):
    config = json.loads((run_dir / "run.json").read_text())["config"]
    changed(run_dir, config={**config, "attention": {"_target_": "os.system"}})
    assert main.main(["recipe", "export", "run", "r.yaml"]) == 2
    assert "'os.system' is not on the list of allowed classes" in capsys.readouterr().err
    assert not Path("r.yaml").exists()


def test_prompts_from_a_file_go_with_it(run_dir, tmp_path, capsys):
    Path("p.txt").write_text("a red circle\n# not this\n1e3, a [blue] square\n")
    config = compose_config(["input.prompts=p.txt", "batch_size=2"])
    draw(config, tmp_path / "many")
    assert main.main(["recipe", "export", "many", "sent/m.yaml"]) == 0
    assert Path("sent/m.jsonl").read_text() == '{"prompt": "a red circle"}\n{"prompt": "1e3, a [blue] square"}\n'
    again = compose_config(["recipe=sent/m.yaml"])
    assert [line["prompt"] for line in again["input"]["prompts"]] == ["a red circle", "1e3, a [blue] square"]
    assert again["batch_size"] == 2
    config["model"]["input_images"] = [0, 1]
    config["input"]["prompts"][0]["images"] = ["/data/x.png"]
    draw(config, tmp_path / "edits")
    assert main.main(["recipe", "export", "edits", "e.yaml"]) == 2
    assert "the run's prompts have input images of their own" in capsys.readouterr().err


def test_what_would_not_compose_to_the_run_is_not_written(run_dir, monkeypatch, capsys):
    monkeypatch.setattr(minimal, "make_minimal_recipe", lambda wanted: {"defaults": [{"override /model": "demo"}]})
    assert main.main(["recipe", "export", "run", "r.yaml"]) == 2
    assert "a recipe cannot reproduce this run: sampling, cache, device, dtype would differ" in capsys.readouterr().err
    assert not list(Path().glob("r.*"))
