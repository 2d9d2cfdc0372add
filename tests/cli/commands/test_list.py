import json

import pytest

from hydrarun.cli.commands import list as listing
from hydrarun.cli.main import dispatch_verb
from hydrarun.config.recipes import search
from hydrarun.core.errors import UsageError

pytestmark = pytest.mark.usefixtures("listed")


def test_everything_there_is_to_choose_is_listed(capsys):
    assert dispatch_verb(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    demo = next(line for line in lines if line.strip().startswith("demo "))
    assert demo.split() == ["demo", "text-to-image", "package:demo", *demo.split()[3:]]
    for name in ["qwen_image", "sdpa", "blocks", *search.list_recipe_names()]:
        assert any(line.strip().startswith(f"{name} ") for line in lines), name
    assert any("no compilation" in line for line in lines)


def test_a_model_shows_its_own_defaults(capsys):
    dispatch_verb(["list", "models"])
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines[2:]}
    assert rows["qwen_image"][:6] == ["text-to-image", "Qwen/Qwen-Image", "20.4B", "50", "4.0", "1328x1328"]
    assert " 3.5 (embedded) " in next(line for line in lines if line.startswith("  flux_dev "))
    video = next(line for line in lines if line.startswith("  wan22_t2v_a14b "))
    assert " 4.0, 3.0 " in video
    assert " 1280x720, 81 frames" in video


def test_a_model_shows_the_accelerations_that_it_goes_with():
    table = listing.make_table("accelerations")
    rows = {row[0]: dict(zip(table.header, row, strict=True)) for row in table.rows}
    assert rows["wan22_t2v_a14b"]["offload"] == "all but modulation"  # it has two experts
    assert rows["flux_dev"]["offload"] == "all but expert"
    assert {row["attention"] for row in rows.values()} == {"all"}
    assert {row["compile"] for row in rows.values()} == {"blocks, full"}
    assert {row["quantization"] for row in rows.values()} == {"all"}


def test_markdown(capsys):
    dispatch_verb(["list", "attention", "--markdown"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == ["### attention", "", "| attention= | what it is |", "| --- | --- |"]
    assert all(line.count("|") == 3 for line in lines[2:])


def test_a_terminal_gets_the_same_cells(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "400")
    dispatch_verb(["list", "recipe", "model"])
    shown = capsys.readouterr().out
    for table in (listing.make_table("recipes"), listing.make_table("models")):
        for row in table.rows:
            assert all(cell in shown for cell in row), json.dumps(row)


@pytest.mark.parametrize(
    ("argv", "words"),
    [(["attenton"], "Did you mean 'attention'? Tables: models,"), (["--json"], "--json: no such flag")],
)
def test_what_is_no_table_is_refused(argv, words):
    with pytest.raises(UsageError) as caught:
        dispatch_verb(["list", *argv])
    assert words in str(caught.value)


def test_help(capsys):
    assert dispatch_verb(["list", "--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: hydrarun list")


def test_first_comment_skips_headers(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text("# @package _global_\n#\n# what it is\n# more\na: 1\n")
    assert listing.read_first_comment(file) == "what it is"
    file.write_text("a: 1\n")
    assert listing.read_first_comment(file) == ""
