"""`hydrarun calibrate`: the option that it writes works for the settings it was made for, and only for them."""

from __future__ import annotations

import itertools
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hydrarun.cli import main
from hydrarun.cli.commands import calibrate
from hydrarun.cli.commands.list import read_first_comment
from hydrarun.cli.main import dispatch_verb
from hydrarun.config.compose import compose_config, compose_unchecked
from hydrarun.config.prompts import read_prompt_texts
from hydrarun.core.errors import UsageError
from hydrarun.core.progress import Progress
from hydrarun.engine.calibration import mask as calibrate_mask
from hydrarun.engine.calibration.mask import ReferenceRuns
from hydrarun.engine.calibration.trial import TrialRunner
from hydrarun.models.weights.safetensors import fingerprint_weights
from tests.config.test_conf import uncommented
from tests.helpers import tiny

QUIET = Progress(quiet=True)


def settings(folder: Path, *more: str) -> list[str]:
    """Return the overrides of a tiny model without the prompt."""
    return [*(word for word in tiny.overrides(folder) if "prompt=" not in word), *more]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("# two\na cat\n\n  two dogs, “asleep” = 1\r\n", encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def fitted(tiny_folder, prompts, tmp_path_factory) -> Path:
    """The folder of a fit at 6 steps."""
    folder = tmp_path_factory.mktemp("fitted")
    words = settings(tiny_folder, "sampling.num_inference_steps=6", "cache=teacache", f"input.prompts={prompts}")
    assert main.main(["calibrate", *words, f"hydra.run.dir={folder}"]) == 0
    return folder


def complaint(*words: str) -> str:
    with pytest.raises(UsageError) as caught:
        dispatch_verb(["calibrate", *words])
    return str(caught.value)


# --- TeaCache --------------------------------------------------------------------------------------------------------


def test_the_option_says_what_it_was_fitted_on(fitted, tiny_folder):
    file = fitted / "cache" / "teacache_qwen_image.yaml"
    fit = yaml.safe_load(file.read_text(encoding="utf-8"))["gate"]["fit"]
    assert len(fit.pop("coefficients")["transformer"]) == 5
    assert fit == {
        "model": "qwen_image",
        "revision": None,
        "weights": fingerprint_weights(tiny_folder),
        "scheduler": "FlowMatchEulerDiscreteScheduler",
        "num_inference_steps": [6, 6],
        "source": "hydrarun calibrate, 2 prompts, 20 pairs",
    }
    assert uncommented(file) == []
    assert read_first_comment(file) == (
        "TeaCache with the coefficients of qwen_image at 6 steps, fitted by hydrarun calibrate"
    )
    assert "# warning: transformer, positive: 10 pairs; 100 or more" in file.read_text()
    assert (fitted / "teacache_qwen_image.svg").read_text(encoding="utf-8").count("<circle") == 20 + 2  # 2: legend


def drawn(capsys, *words: str) -> tuple[int, str]:
    code = main.main(list(words))
    return code, capsys.readouterr().err.strip()


def test_the_option_is_used_from_the_command_and_from_python(fitted, tiny_folder, tmp_path, capsys):
    words = [*tiny.overrides(tiny_folder), "sampling.num_inference_steps=6", "cache=teacache_qwen_image"]
    config = compose_config([*words, f"hydra.searchpath=[file://{fitted}]"])
    option = yaml.safe_load((fitted / "cache" / "teacache_qwen_image.yaml").read_text(encoding="utf-8"))
    assert config["cache"]["gate"]["fit"] == option["gate"]["fit"]
    assert config["cache"]["gate"]["_target_"].endswith(".TeaCache")
    run = [*words, "cache.gate.threshold=1000", f"hydra.run.dir={tmp_path}"]
    assert drawn(capsys, *run, "--config-dir", str(fitted))[0] == 0
    steps = json.loads((tmp_path / "run.json").read_text())["cache"]["steps"]["transformer"]["positive"]
    assert steps == {"computed": [0, 5], "skipped": [1, 2, 3, 4]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model=qwen_image_2512", "cache.gate.fit: the coefficients were fitted on another model than qwen_image_2512"),
        ("sampling.num_inference_steps=7", "cache.gate.fit: the coefficients were fitted on other numbers of steps"),
        (
            "model.scheduler={_target_: diffusers.FlowMatchHeunDiscreteScheduler}",
            "cache.gate.fit: the coefficients were fitted with FlowMatchEulerDiscreteScheduler, not FlowMatchHeun",
        ),
        ("model.path", "cache.gate.fit: the coefficients were fitted on other weights than those "),
    ],
)
def test_it_is_refused_on_anything_else(fitted, tiny_folder, tmp_path, capsys, change, message):
    if change == "model.path":
        shutil.copytree(tiny_folder, tmp_path / "other")
        tiny.transformer(seed=1).save_pretrained(tmp_path / "other" / "transformer")
        change = f"model.path={tmp_path / 'other'}"
    words = [*tiny.overrides(tiny_folder), "sampling.num_inference_steps=6", change, "cache=teacache_qwen_image"]
    words = list({word.partition("=")[0]: word for word in words}.values())
    code, said = drawn(capsys, *words, f"hydra.run.dir={tmp_path / 'out'}", "--config-dir", str(fitted))
    assert code == 2
    assert message in said
    if "model.path" not in change:  # refused before the output folder is created
        assert not (tmp_path / "out").exists()
        return
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (record["status"], record["outputs"]) == ("failed", [])
    assert record["error"]["message"].startswith(message)


def test_the_printed_line_draws(tiny_folder, prompts, tmp_path, capsys):
    words = settings(tiny_folder, "cache=teacache", "sampling.num_inference_steps=6", f"input.prompts={prompts}")
    assert dispatch_verb(["calibrate", *words, f"hydra.run.dir={tmp_path / 'a b'}"]) == 0
    *_, file, line = capsys.readouterr().out.splitlines()
    assert file == str(tmp_path / "a b" / "cache" / "teacache_qwen_image.yaml")
    program, *argv = shlex.split(line)
    assert program == "hydrarun"
    assert "sampling.prompt=a cat" in argv
    assert main.main([*argv, f"hydra.run.dir={tmp_path / 'out'}"]) == 0
    assert len(list((tmp_path / "out").glob("*.png"))) == 1


@pytest.mark.parametrize("subject", ["wan22_t2v_a14b"], indirect=True)
def test_two_experts_have_two_polynomials(subject, tmp_path, capsys):
    words = [word for word in subject.overrides() if "prompt=" not in word]
    words += ["sampling.num_inference_steps=9", "sampling.prompt=[a cat, two dogs]"]
    assert dispatch_verb(["calibrate", *words, "cache=teacache", f"hydra.run.dir={tmp_path}"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {expert}  " in out for expert in ("transformer", "transformer_2"))
    config = compose_config([*words, f"hydra.searchpath=[file://{tmp_path}]", "cache=teacache_wan22_t2v_a14b"])
    assert set(config["cache"]["gate"]["fit"]["coefficients"]) == {"transformer", "transformer_2"}


def test_the_demo_models_fit_is_of_its_weights(demo_folder):
    fit = compose_config(["cache=teacache"])["model"]["teacache"]
    assert (fit["model"], fit["weights"]) == ("demo", fingerprint_weights(demo_folder))
    with pytest.raises(UsageError, match="other numbers of steps than 50"):
        compose_config(["cache=teacache", "sampling.num_inference_steps=50"])


# --- masks -----------------------------------------------------------------------------------------------------------

MASK = ("sampling.num_inference_steps=7", "cache=mask", "cache.budget=0.57")


@pytest.fixture(scope="module")
def searched(tiny_folder, prompts, tmp_path_factory) -> Path:
    """The folder of a search for 4 of 7 steps."""
    folder = tmp_path_factory.mktemp("searched")
    words = settings(tiny_folder, *MASK, "cache/predictor=taylor", f"input.prompts={prompts}")
    assert main.main(["calibrate", *words, f"hydra.run.dir={folder}"]) == 0
    return folder


def steps(folder: Path) -> list[int]:
    return yaml.safe_load((folder / "cache" / "mask_qwen_image.yaml").read_text())["gate"]["steps"]


def scores(folder: Path) -> dict[tuple[int, ...], float]:
    _, *lines = (folder / "scores.jsonl").read_text().splitlines()
    rows = map(json.loads, lines)
    return {tuple(row["steps"]): row["score"] for row in rows}


def test_the_mask_is_the_best_of_all(searched, tiny_folder, prompts):
    config, _ = compose_unchecked([*settings(tiny_folder, *MASK[:2]), "cache/predictor=taylor"])
    job = calibrate.CalibrationJob(config, config["cache"], read_prompt_texts(str(prompts)), searched, [], 0.57, 200)
    twins = ReferenceRuns(job, TrialRunner(job.config, QUIET))
    exact = {(0, *rest): twins.score((0, *rest)) for rest in itertools.combinations(range(1, 7), 3)}
    assert tuple(steps(searched)) == min(exact, key=exact.__getitem__)
    assert all(exact[mask] == score for mask, score in scores(searched).items())


def test_the_option_of_a_mask(searched, tiny_folder, tmp_path, capsys):
    file = searched / "cache" / "mask_qwen_image.yaml"
    assert uncommented(file) == []
    assert read_first_comment(file).startswith(
        "4 of 7 steps of qwen_image (budget 0.57), searched by hydrarun calibrate on 2 prompts: latents' mean squared"
    )
    words = [*settings(tiny_folder, MASK[0]), "sampling.prompt=a cat", "cache=mask_qwen_image"]
    cache = compose_config([*words, f"hydra.searchpath=[file://{searched}]"])["cache"]
    gate = {"steps": steps(searched), "density": None, "num_inference_steps": 7}
    assert cache["gate"] == {"_target_": "hydrarun.acceleration.cache.gates.Mask", **gate}
    assert cache["predictor"] == {"_target_": "hydrarun.acceleration.cache.predictors.Taylor", "order": 1}
    other = compose_config([*words, f"hydra.searchpath=[file://{searched}]", "cache/predictor=reuse"])["cache"]
    assert other["predictor"] == {"_target_": "hydrarun.acceleration.cache.predictors.Reuse"}
    run = [*words, f"hydra.run.dir={tmp_path}", "--config-dir", str(searched)]
    assert drawn(capsys, *run)[0] == 0
    ran = json.loads((tmp_path / "run.json").read_text())["cache"]["steps"]["transformer"]["positive"]
    assert ran["computed"] == steps(searched)


def test_a_recipe_carries_the_mask(searched, tiny_folder, tmp_path):
    recipe = {"defaults": [{"override /cache": "mask"}], "cache": {"gate": {"steps": steps(searched), "density": None}}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe))
    words = [*settings(tiny_folder, MASK[0]), "sampling.prompt=a cat", f"recipe={tmp_path / 'mine.yaml'}"]
    assert compose_config(words)["cache"]["gate"]["steps"] == steps(searched)


@pytest.mark.parametrize("kind", ["order", "own class"])
def test_a_predictor_is_written_with_what_differs(kind):
    predictor = {"_target_": "hydrarun.acceleration.cache.predictors.Taylor", "order": 2}
    if kind == "order":
        expected = (["override predictor: taylor"], "predictor: {order: 2}")
    else:
        predictor["_target_"] = "mine.Predictor"
        expected = ([], "predictor: {_target_: mine.Predictor, order: 2}")
    defaults, lines = calibrate_mask.format_predictor(predictor)
    assert (defaults, lines[1]) == expected


def count_scores(monkeypatch, die_after: int = 1000) -> list[tuple[int, ...]]:
    """Return the list of evaluated masks; after `die_after` of them the process is interrupted."""
    asked: list[tuple[int, ...]] = []
    score = ReferenceRuns.score

    def counted(self, mask):
        if len(asked) == die_after:
            raise KeyboardInterrupt
        asked.append(mask)
        return score(self, mask)

    monkeypatch.setattr(ReferenceRuns, "score", counted)
    return asked


def test_a_search_that_was_killed_goes_on(searched, tiny_folder, prompts, tmp_path, monkeypatch, capsys):
    words = settings(tiny_folder, *MASK, "cache/predictor=taylor", f"input.prompts={prompts}")
    words = ["calibrate", *words, f"hydra.run.dir={tmp_path}"]
    with monkeypatch.context() as patch:
        asked = count_scores(patch, die_after=5)
        assert main.main(words) == 130
    ledger = tmp_path / "scores.jsonl"
    ledger.write_bytes(ledger.read_bytes() + b'{"steps": [0, 1')  # as if the process was killed while it wrote a line
    with monkeypatch.context() as patch:
        rest = count_scores(patch)
        assert main.main(words) == 0
    assert [*asked, *rest] == list(scores(searched))
    assert len(asked) == 5
    assert scores(tmp_path) == scores(searched)
    assert (tmp_path / "cache" / "mask_qwen_image.yaml").read_text() == (
        searched / "cache" / "mask_qwen_image.yaml"
    ).read_text()


def test_another_configuration_does_not_go_on(searched, tiny_folder, prompts, capsys):
    words = settings(tiny_folder, *MASK, f"input.prompts={prompts}", "sampling.seed=1", f"hydra.run.dir={searched}")
    assert main.main(["calibrate", *words]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.endswith(
        "scores.jsonl: its scores are of another configuration (predictor, sampling); choose another folder:"
        " hydra.run.dir=…"
    )


def test_no_more_masks_are_tried_than_allowed(tiny_folder, tmp_path, capsys):
    words = [*tiny.overrides(tiny_folder), *MASK, "cache.evaluations=3", f"hydra.run.dir={tmp_path}"]
    words = list({word.partition("=")[0]: word for word in words}.values())
    assert dispatch_verb(["calibrate", *words]) == 0
    assert len(scores(tmp_path)) == 3
    out = capsys.readouterr().out
    assert "3 masks of 4 of 7 steps tried on 1 prompt: cache.evaluations is reached" in out
    assert f"best: latents' mean squared error {min(scores(tmp_path).values()):.4g}, PSNR " in out


@pytest.mark.parametrize("subject", ["wan22_t2v_a14b"], indirect=True)
def test_the_first_step_of_each_expert_is_computed(subject, tmp_path):
    words = [*subject.overrides(), "cache=mask", "cache.evaluations=4", "sampling.num_inference_steps=6"]
    assert dispatch_verb(["calibrate", *words, "cache.budget=0.34", f"hydra.run.dir={tmp_path}"]) == 0
    (mask,) = scores(tmp_path)
    assert len(mask) == 2
    with pytest.raises(UsageError, match=r"cache.budget=0.2: 1 of 6 steps; the computed ones are at least 2 "):
        dispatch_verb(["calibrate", *words, "cache.budget=0.2", f"hydra.run.dir={tmp_path / 'other'}"])


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "calibrate: choose cache=teacache, whose polynomial it fits, or cache=mask, whose steps it searches"),
        (["cache=every_n"], "calibrate: choose cache=teacache, whose"),
        (["cache=teacache", "cache.budget=0.5"], "cache.budget: a setting of calibrate for cache=mask; cache=teacache"),
        (["cache=teacache", "cache.evaluations=5"], "cache.evaluations: a setting of calibrate for cache=mask"),
        (["cache=mask"], "cache.budget is missing: the share of steps that may be computed, cache.budget=0.5"),
        (["cache=mask", "cache.budget=half"], "cache.budget=half: not a share of the steps, above 0 and below 1"),
        (["cache=mask", "cache.budget=1"], "cache.budget=1: not a share of the steps"),
        (["cache=mask", "cache.budget=nan"], "cache.budget=nan: not a share of the steps"),
        (["cache=mask", "cache.budget=0.5", "cache.evaluations=0"], "cache.evaluations=0: not a whole number >= 1"),
        (["cache=mask", "cache.budget=0.5", "cache.gate.steps=[0,2]"], "cache.gate.steps: calibrate searches them"),
        (["cache=teacache", "-m"], "calibrate: -m: no such flag; it takes none but --help."),
        (["cache=teacache", "prompts.txt"], "calibrate: prompts.txt: neither key=value nor a flag"),
        (["cache=teacache", "warmup=1"], "warmup: calibrate measures no times; leave it out"),
        (["cache=teacache", "parallel=cfg2"], "parallel: calibrate in one process (parallel=none); the result holds"),
        (
            ["cache=teacache", "sampling.hieght=64"],
            "sampling.hieght (command line): unknown key. Did you mean 'height'",
        ),
        (["cache=teacache", "sampling.height=60"], "sampling.height=60: this checkpoint needs a multiple of 16"),
        (["cache=teacache", "dtype=float"], "dtype (command line): 'float' is none of auto, float32"),
        (["cache=teacache", "sampling.num_inference_steps=1,2"], "several values"),
        (["cache=teacache", "input.prompts=/nowhere.txt"], "input.prompts=/nowhere.txt: No such file or directory"),
        (
            ["cache=teacache", "input.prompts=/nowhere.txt", "sampling.prompt=a"],
            "input.prompts and sampling.prompt are both given: leave one out",
        ),
    ],
)
def test_mistakes(words, message):
    assert message in complaint(*words)


def test_a_file_without_prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("# nothing\n\n   \n")
    assert complaint("cache=teacache", f"input.prompts={file}") == (
        f"input.prompts={file}: no prompt in it: one per line; lines that start with # are comments"
    )
    file.write_bytes(b"caf\xe9\n")
    assert complaint("cache=teacache", f"input.prompts={file}") == f"input.prompts={file}: not UTF-8 text"


def test_prompts_are_read_to_the_letter(prompts):
    assert read_prompt_texts(str(prompts)) == ["a cat", "two dogs, “asleep” = 1"]


def test_mistakes_are_found_before_torch_is_imported():
    code = """
import sys
from hydrarun.cli.main import dispatch_verb
from hydrarun.core.errors import UsageError
try:
    dispatch_verb(["calibrate", "cache=mask", "cache.budget=2"])
except UsageError as error:
    print(error)
print([name for name in ("torch", "diffusers") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert done.stdout.startswith("cache.budget=2: not a share")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["cache=mask", "cache.budget=0.5"], "cache.budget (command line): unknown key."),
        (["cache=mask", "cache.evaluations=5"], "cache.evaluations (command line): unknown key."),
    ],
)
def test_a_plain_run_knows_nothing_of_calibrations_settings(words, message):
    with pytest.raises(UsageError) as caught:
        compose_config(words)
    assert message in str(caught.value)


def test_help(capsys):
    assert main.main(["calibrate", "--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: hydrarun calibrate cache=teacache input.prompts=FILE")
