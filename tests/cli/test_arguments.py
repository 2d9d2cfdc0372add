import pytest

from hydrarun.cli.arguments import parse_arguments
from hydrarun.core.errors import UsageError


@pytest.mark.parametrize(
    ("argv", "verb", "overrides", "flags"),
    [
        ([], "run", [], []),
        (["a=1"], "run", ["a=1"], []),
        (["run", "a=1"], "run", ["a=1"], []),
        (["a=1", "-m", "b=1,2"], "run", ["a=1", "b=1,2"], ["-m"]),
        (["--cfg", "job", "a=1", "--resolve"], "run", ["a=1"], ["--cfg", "job", "--resolve"]),
        (["--cfg=job", "a=1"], "run", ["a=1"], ["--cfg=job"]),
        (["--info", "a=1"], "run", ["a=1"], ["--info"]),
        (["--info", "defaults", "a=1"], "run", ["a=1"], ["--info", "defaults"]),
        (["--config-dir", "x=y", "a=1"], "run", ["a=1"], ["--config-dir", "x=y"]),
        (["-sc", "query=bash"], "run", ["query=bash"], ["-sc"]),
        (["~model"], "run", ["~model"], []),
        (["sampling.prompt=-m", "b=--help"], "run", ["sampling.prompt=-m", "b=--help"], []),
        (["list", "models", "--markdown"], "list", ["models"], ["--markdown"]),
        (["report", "a", "--reference", "b"], "report", ["a"], ["--reference", "b"]),
        (["recipe", "run", "a.yaml", "--yes"], "recipe run", ["a.yaml"], ["--yes"]),
        (["recipe"], "recipe", [], []),
        (["replay", "x.png", "device=cpu"], "replay", ["x.png", "device=cpu"], []),
    ],
)
def test_words_are_sorted_whatever_their_order(argv, verb, overrides, flags):
    assert parse_arguments(argv)[:3] == (verb, overrides, flags)


def test_allowed_targets_are_taken_out_for_every_verb():
    assert parse_arguments(["--allow-target", "a.B", "x=1", "--allow-target=c.D"]).targets == ["a.B", "c.D"]
    assert parse_arguments(["replay", "f.png", "--allow-target", "a.B"]) == ("replay", ["f.png"], [], ["a.B"])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["lst"], "lst: no such verb. Did you mean 'list'? Verbs: run, plan, replay, report, recipe, calibrate, list"),
        (["--cgf", "job"], "--cgf: no such flag. Did you mean '--cfg'?"),
        (["--multi"], "--multi: no such flag. Did you mean '--multirun'?"),
        (["--experimental-rerun", "config.pickle"], "--experimental-rerun: no such flag"),
        (["sampling.prompt=a", "red", "cat"], "red: neither key=value nor a flag; a text with spaces needs quotes"),
        (["a=1", "--cfg"], "--cfg: needs a value"),
        (["--allow-target"], "--allow-target: needs a value"),
    ],
)
def test_what_cannot_be_sorted_is_refused(argv, words):
    with pytest.raises(UsageError) as caught:
        parse_arguments(argv)
    assert words in str(caught.value)
