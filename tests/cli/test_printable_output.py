"""Text of others that a command shows: on the command line, in names and in files. None of it controls the terminal."""

from __future__ import annotations

import json
import shutil
import unicodedata
from pathlib import Path

import pytest

from hydrarun.cli.main import main
from hydrarun.core.printable import HIDDEN
from hydrarun.engine.ranks.failure import RankFailure

HOSTILE = "[bold]a :cat: \x1b[2J\x1b]0;t\x07\x9b2J\x7f\u202e\u2066"
SHOWN = "[bold]a :cat: ?[2J?]0;t??2J???"


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    """Run the command; return its exit code and all that it shows, which no terminal obeys."""
    code = main(words)
    shown = "".join(capsys.readouterr())
    assert not [one for one in shown if one not in "\n\t" and unicodedata.category(one) in HIDDEN]
    return code, shown


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([f"sampling.{HOSTILE}=3"], "sampling."),
        ([f"{HOSTILE}=3"], ""),
        ([HOSTILE], SHOWN),
        ([f"--{HOSTILE}"], f"--{SHOWN}: no such flag."),
        ([f"model={HOSTILE}"], "model="),
        (["sampling.prompt=a", f"model.path=/{HOSTILE}\nerror: b"], f"model.path=/{SHOWN} error: b: no such folder."),
        ([f"input.prompts={HOSTILE}\nerror: b.txt"], f"input.prompts={SHOWN} error: b.txt: "),
        (["sampling.prompt=a", f"input.images=/{HOSTILE}\nb"], "input.images (command line): lists 1 image"),
        (["sampling.prompt=a", f"device={HOSTILE}"], "device (command line): "),
        (["replay", f"/{HOSTILE}\nb.png"], f"/{SHOWN} b.png: "),
        (["report", f"/{HOSTILE}\nb"], f"report: /{SHOWN} b"),
        (["recipe", "run", f"/{HOSTILE}\nb.yaml"], f"recipe run: /{SHOWN} b.yaml: "),
        (["list", f"{HOSTILE}\nb"], f"list {SHOWN} b: no such table."),
    ],
)
def test_what_the_command_line_quotes(words, line, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, shown = run(capsys, *words)
    assert code == 2
    assert shown.startswith(line)
    assert len(shown.splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("a.csv", f'"prompt","{HOSTILE}\nb"\n"c",1\n', f"a.csv line 1: {SHOWN} b: unknown field."),
        ("a.jsonl", json.dumps({"prompt": "a", f"{HOSTILE}\nb": 1}), f"a.jsonl line 1: {SHOWN} b: unknown field."),
        (f"{HOSTILE}\nb.csv", "x\n1\n", f"{SHOWN} b.csv line 1: x: unknown field."),
    ],
)
def test_what_a_file_of_prompts_holds(name, content, line, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path(name).write_text(content)
    code, shown = run(capsys, f"input.prompts={name}")
    assert (code, len(shown.splitlines())) == (2, 1)
    assert shown.startswith(line)


@pytest.fixture
def checkpoint(tiny_folder, tmp_path, monkeypatch) -> Path:
    """A copy of the tiny checkpoint in the current folder."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(tiny_folder, "tiny"))


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("file", "values", "line"),
    [
        (
            "model_index.json",
            {"_class_name": f"{HOSTILE}\nb"},
            f"does not run a checkpoint of {SHOWN} b, which no model runs",
        ),
        ("model_index.json", {"vae": [f"{HOSTILE}\nb", "X"]}, r"[bold]a :cat: \x1b[2J\x1b]0;t\x07"),
        ("model_index.json", {"vae": ["diffusers", f"{HOSTILE}\nb"]}, f"has no component {SHOWN} b"),
        ("transformer/config.json", {"num_layers": f"{HOSTILE}\nb"}, r"num_layers: '[bold]a :cat: \x1b[2J"),
        ("scheduler/scheduler_config.json", {f"{HOSTILE}\nb": {"auto_map": 1}}, f"{SHOWN} b.auto_map is not allowed"),
    ],
)
def test_what_a_checkpoint_holds(file, values, line, checkpoint, capsys):
    change(checkpoint / file, **values)
    code, shown = run(capsys, "model.path=tiny", "sampling.prompt=a", "model=qwen_image", "device=cpu", "dtype=float32")
    assert code in (1, 2)
    assert line in shown.splitlines()[-1]


def test_the_keys_of_a_config_that_a_note_names(checkpoint, capsys):
    change(checkpoint / "transformer" / "config.json", **{f"{HOSTILE}\nerror: b": 1})
    size = ("sampling.height=32", "sampling.width=32", "sampling.num_inference_steps=2")
    code, shown = run(capsys, "model.path=tiny", "sampling.prompt=a", "model=qwen_image", "device=cpu", *size)
    assert code == 0
    noted = [line for line in shown.splitlines() if "not used by" in line]
    assert noted == [f"transformer/config.json: {SHOWN} error: b not used by QwenImageTransformer"]


def test_a_configuration_is_printed_without_loss(capsys):
    prompt = f"{HOSTILE}\nb 猫"
    code, shown = run(capsys, f"sampling.prompt={prompt}", "--cfg", "job", "--resolve")
    assert code == 0
    import yaml

    assert yaml.safe_load(shown)["sampling"]["prompt"] == prompt


def test_a_dry_run_lists_a_prompt_as_one_line(capsys):
    prompts = f'choice("{SHOWN} \x1b[2J\\nerror: b","c")'.replace("\\n", "\n")
    _, shown = run(capsys, "-m", "--dry-run", f"sampling.prompt={prompts}", "device=cpu")
    assert len([line for line in shown.splitlines() if "error: b" in line]) == 1
    assert not [line for line in shown.splitlines() if line.startswith("error: b")]


def test_what_a_rank_says_of_its_failure():
    """Its lines are kept: a traceback has several."""
    failure = RankFailure(1, 0, "RunError", may_follow=False, text=f"Traceback\n  {HOSTILE}\nrank 1: x")
    assert str(failure.to_exception()) == f"Traceback\n  {SHOWN}\nrank 1: x"
