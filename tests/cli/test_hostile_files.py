"""What stands in the place of a file that a command reads is told in one line: nothing is read without end."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hydrarun.cli import main
from hydrarun.config.hydra_main import WRITTEN
from hydrarun.config.prompts import MAX_LINES, MAX_MISTAKES
from hydrarun.core.errors import LISTED

#: by name: what is made in the place of the file, and the reason that is given
PLACES = {
    "pipe": (os.mkfifo, "a pipe, not a regular file"),
    "device": (lambda path: os.symlink("/dev/zero", path), "a device, not a regular file"),
    "loop": (lambda path: os.symlink(path, path), "Too many levels of symbolic links"),
    "sparse": (lambda path: (path.touch(), os.truncate(path, 8 * 2**30)), "larger than "),
}

#: the name of the file, and the words of the command before and after it
COMMANDS = {
    "recipe": ("x.yaml", ["recipe=./x.yaml"]),
    "recipe run": ("x.yaml", ["recipe", "run", "./x.yaml", "--yes"]),
    "recipe verify": ("x.yaml", ["recipe", "verify", "./x.yaml"]),
    "recipe in a sweep": ("x.yaml", ["-m", "recipe=./x.yaml"]),
    "prompts": ("x.txt", ["input.prompts=x.txt"]),
    "prompts in a table": ("x.csv", ["input.prompts=x.csv"]),
    "prompts as objects": ("x.jsonl", ["input.prompts=x.jsonl"]),
    "prompts to calibrate": ("x.txt", ["calibrate", "cache=teacache", "input.prompts=x.txt"]),
    "replay of a picture": ("x.png", ["replay", "x.png"]),
    "replay of a video": ("x.mp4", ["replay", "x.mp4"]),
    "replay of a sound": ("x.wav", ["replay", "x.wav"]),
    "replay of a run": ("x.json", ["replay", "x.json"]),
    "replay of a frame": ("frames/frame-00000.png", ["replay", "frames"]),
    "export": ("run/run.json", ["recipe", "export", "run"]),
    "input image": ("x.png", ["model=qwen_image_edit", "sampling.prompt=x", "input.images=x.png"]),
}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refusal(words: list[str], capsys) -> str:
    assert main.main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_no_file(command, place, folder, capsys):
    name, words = COMMANDS[command]
    make, reason = PLACES[place]
    (folder / name).parent.mkdir(exist_ok=True)
    make(folder / name)
    assert reason in refusal(words, capsys)


@pytest.mark.parametrize(
    "words",
    [
        ["recipe=./{}.yaml"],
        ["recipe", "run", "{}.yaml", "--yes"],
        ["recipe", "export", "{}"],
        ["input.prompts={}.txt"],
        ["model.path={}"],
        ["model.path=./{}"],
        ["report", "{}"],
        ["replay", "{}.png"],
        ["replay", "{}.json"],
        ["--config-dir", "{}"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("name", ["x" * 300, "a/" * 3000 + "x", "~nobody-of-that-name/x"], ids=["long", "deep", "home"])
def test_names_of_no_file(words, name, folder, capsys):
    assert refusal([word.format(name) for word in words], capsys)


def test_a_report_names_a_run_that_cannot_be_read(folder, capsys):
    (folder / "run" / ".hydra").mkdir(parents=True)
    os.mkfifo(folder / "run" / "run.json")
    (folder / "run" / ".hydra" / "overrides.yaml").write_text("[" * 10_000)
    assert main.main(["report", "run"]) == 0
    pages = "".join(page.read_text() for page in (folder / "run").glob("*.html"))
    assert "run.json: a pipe, not a regular file" in pages


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"gate: " + b"[" * 400 + b"]" * 400, "nested too deeply"),
        (b"gate: [", "mine.yaml, line 1: expected the node content"),
        (b"gate: !!python/object/apply:os.system [x]", "mine.yaml, line 1: could not determine a constructor"),
        (b"\xff\xfe\xff", "not UTF-8 text"),
    ],
    ids=["deep", "cut off", "tag", "bytes"],
)
def test_damaged_options_of_ones_own(content, message, folder, capsys):
    (folder / "own" / "cache").mkdir(parents=True)
    (folder / "own" / "cache" / "mine.yaml").write_bytes(content)
    assert message in refusal(["--config-dir", "own", "cache=mine"], capsys)


@pytest.mark.parametrize("depth", [150, 300, 3000])
@pytest.mark.parametrize("key", ["sampling.seed", "model.path"])
def test_values_nested_on_the_command_line(key, depth, folder, capsys):
    assert refusal([f"{key}={'[' * depth}1{']' * depth}"], capsys)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "folder"])
@pytest.mark.parametrize("name", WRITTEN)
def test_what_a_run_writes_over(name, make, folder, capsys):
    (folder / "run" / ".hydra").mkdir(parents=True)
    make(folder / "run" / name)
    line = refusal(["sampling.num_inference_steps=2", "hydra.run.dir=run"], capsys)
    assert line.startswith(f"hydra.run.dir=run: {name} in it: a ")
    assert line.endswith("; choose another folder")


def test_what_a_point_of_a_sweep_writes_over(folder, capsys):
    (folder / "sweep" / "0" / ".hydra").mkdir(parents=True)
    os.mkfifo(folder / "sweep" / "0" / ".hydra" / "config.yaml")
    line = refusal(["-m", "sampling.seed=1,2", "hydra.sweep.dir=sweep"], capsys)
    assert "0: .hydra/config.yaml in it: a pipe" in line


@pytest.mark.parametrize(("name", "line"), [("x.txt", "#"), ("x.txt", ""), ("x.jsonl", "{}")])
def test_a_file_of_too_many_lines(name, line, folder, capsys):
    (folder / name).write_text(f"{line}\n" * (MAX_LINES + 1))
    words = ["sampling.num_inference_steps=2", f"input.prompts={name}"]
    assert refusal(words, capsys) == f"input.prompts={name}: more than {MAX_LINES} lines; split the file"


def test_mistakes_are_not_collected_without_end(folder, capsys):
    (folder / "x.jsonl").write_text("{}\n" * 100_000)
    assert main.main(["sampling.num_inference_steps=2", "input.prompts=x.jsonl"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"… and {MAX_MISTAKES + 1 - LISTED} more"
