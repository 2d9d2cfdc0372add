"""The command shown for a point repeats the point."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString

from hydrarun.cli import arguments, main
from hydrarun.config.compose import compose_unchecked
from hydrarun.core.quoting import escape_interpolation, quote_overrides
from hydrarun.outputs.report import command_line
from hydrarun.outputs.report.collect import collect_points
from tests.helpers import fake_sweep
from tests.helpers.fake_sweep import picture

NASTY = [
    "a cat",
    "a cat, sitting (on a mat) = cosy; 50% grey",
    "it's 'quoted' and \"quoted\"",
    '"a sign"',
    '"open',
    "[a, b]",
    "[red] cat",
    'choice("a","b")',
    "null",
    "${x} \\${y} \\\\${z}",
    "${ open",
    "ends with \\",
    "two\nlines\t",
    " blanks around ",
    "一只猫，坐着 😀",
    "~/not a path",
    "-m",
    "$HOME `ls` !! #",
]


@pytest.fixture
def swept(tmp_path, monkeypatch):
    """Run a sweep with a fake run; returns the configurations by the names of their points."""

    def do(*words: str) -> dict[str, dict]:
        seen: dict[str, dict] = {}

        def keep(config, folder):
            seen[folder.name] = config
            (folder / "run.json").write_text('{"format": 1, "status": "complete", "outputs": []}')

        monkeypatch.setattr("hydrarun.engine.ranks.launch.run_configuration", keep)
        assert main.main([*words, f"hydra.sweep.dir={tmp_path / 'sweep'}", "-m"]) == 0
        return seen

    return do


def composed(command: str) -> dict:
    """Compose the configuration of a shell command."""
    program, *words = shlex.split(command)
    assert program == "hydrarun"
    line = arguments.parse_arguments(words)
    assert (line.verb, line.flags) == ("run", [])
    return compose_unchecked(quote_overrides(line.words))[0]


def commands(folder: Path) -> dict[str, str | None]:
    return {point.name: command_line.format_command(point) for point in collect_points(folder)}


def test_prompts_come_back_from_a_sweep(swept, tmp_path):
    texts = ["a, b (c) = 'd'", "${x} \\${y}", "[a, b]"]
    choice = ",".join(f'"{text}"' for text in texts)
    seen = swept(f"sampling.prompt=choice({choice})", "sampling.negative_prompt=no, #")
    assert [seen[name]["sampling"]["prompt"] for name in "012"] == texts
    for name, command in commands(tmp_path / "sweep").items():
        assert composed(command) == seen[name]


@pytest.mark.parametrize("text", NASTY)
def test_every_prompt_comes_back_from_its_record(text):
    recorded = f"sampling.prompt={QuotedString(escape_interpolation(text), Quote.double).with_quotes()}"
    assert parsed(recorded) == escape_interpolation(text)
    (read_again,) = quote_overrides(shlex.split(shlex.join([command_line.requote_override(recorded)])))
    assert parsed(read_again) == parsed(recorded)


def parsed(override: str) -> str:
    return OverridesParser.create().parse_override(override).value()


def test_plain_prompts_stay_readable():
    def command(*texts: str) -> str:
        return shlex.join(command_line.requote_override(word) for word in quote_overrides(list(texts)))

    assert command("sampling.prompt=a cat, sitting") == "'sampling.prompt=a cat, sitting'"
    assert command("sampling.prompt=cost: ${x}") == "'sampling.prompt=cost: ${x}'"
    assert command("sampling.negative_prompt=null") == "sampling.negative_prompt=null"
    assert command("sampling.prompt=[a cat, a dog]") == """'sampling.prompt=["a cat","a dog"]'"""


def test_lists_and_images_come_back():
    words = ["model=qwen_image_edit_plus", "sampling.prompt=x", 'input.images=["/d/a, b.png", /d/${c}.png]']
    config = compose_unchecked(quote_overrides(words))[0]
    assert config["input"]["images"] == ["/d/a, b.png", "/d/${c}.png"]
    assert composed(shlex.join(["hydrarun", *map(command_line.requote_override, quote_overrides(words))])) == config


def test_the_inverse_of_the_escape():
    for text in (*NASTY, "\\\\${a}\\${b}${c}"):
        assert command_line.unescape_interpolation(escape_interpolation(text)) == text


def test_home_and_tokens_do_not_leave(tmp_path):
    home = str(Path.home())
    words = [
        f"model.path={home}/models/x",
        f"report.twins={home}/t",
        f"sampling.prompt={home} is a word",
        "+x=hf_abcdefgh123",
    ]
    fake_sweep.hydra(tmp_path, "0", words)
    command = commands(tmp_path)["0"]
    assert command == (
        f"hydrarun 'model.path=~/models/x' 'report.twins=~/t' 'sampling.prompt={home} is a word' '+x=[removed]'"
    )


def test_without_hydras_record_the_run_is_replayed(tmp_path):
    folder = fake_sweep.add(tmp_path, "a b", [], [picture(0)])
    (folder / ".hydra" / "overrides.yaml").unlink()
    assert commands(tmp_path) == {"a b": "hydrarun replay 'a b/run.json'"}
    assert commands(folder) == {".": "hydrarun replay run.json"}
    (folder / "run.json").write_text("{")
    assert commands(tmp_path) == {"a b": None}
