"""Prompt files: the lines that are read, and the error for every wrong line before anything runs."""

from __future__ import annotations

import json

import pytest

from hydrarun.config import prompts
from hydrarun.core.errors import LISTED, UsageError


def read(folder, name: str, content: str | bytes) -> list[dict]:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return prompts.read_prompts(str(path))


def complaint(folder, name: str, content: str | bytes) -> str:
    with pytest.raises(UsageError) as caught:
        read(folder, name, content)
    return str(caught.value).replace(f"{folder}/", "")


def test_text_has_a_prompt_in_each_line(tmp_path):
    content = '\ufeff# a comment\n\n  a cat, "asleep" = 1  \r\n${x} \u2028 one line\n'
    assert read(tmp_path, "a.txt", content) == [
        {"line": 3, "prompt": 'a cat, "asleep" = 1'},
        {"line": 4, "prompt": "${x} \u2028 one line"},
    ]


def test_csv_sets_fields_and_leaves_empty_cells_alone(tmp_path):
    content = (
        "prompt,seed,true_cfg_scale,negative_prompt,images\n"
        '"a cat, ""asleep""",7,2.5,,a.png;/b c.png\n'
        "\n"
        '"two\nlines",,,blur,\n'
        "#1,8,,,\n"
    )
    assert read(tmp_path, "a.csv", content) == [
        {
            "line": 2,
            "prompt": 'a cat, "asleep"',
            "seed": 7,
            "true_cfg_scale": 2.5,
            "images": [str(tmp_path / "a.png"), "/b c.png"],
        },
        {"line": 4, "prompt": "two\nlines", "negative_prompt": "blur"},
        {"line": 6, "prompt": "#1", "seed": 8},
    ]


def test_json_lines_set_fields_with_their_types(tmp_path):
    rows = [{"prompt": "a, b", "seed": 3, "images": "x.png"}, {"prompt": "#", "negative_prompt": None, "width": 64}]
    assert read(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows))) == [
        {"line": 1, "prompt": "a, b", "seed": 3, "images": [str(tmp_path / "x.png")]},
        {"line": 2, "prompt": "#", "negative_prompt": None, "width": 64},
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "prompt,hieght\na,1\n", "a.csv line 1: hieght: unknown field. Did you mean 'height'? Known: prompt,"),
        ("a.csv", "prompt,seed,seed\na,1,2\n", "a.csv line 1: seed: two columns of it"),
        ("a.csv", "prompt,seed\na,1\nb\n", "a.csv line 3: 1 cells, and the first line names 2"),
        ("a.csv", "prompt,seed\na,1.5\n", "a.csv line 2: seed: '1.5' is not a whole number"),
        ("a.csv", "prompt,seed\na,1\n,2\n", "a.csv line 3: no prompt"),
        ("a.csv", 'prompt\n"a\n', "a.csv line 2: unexpected end of data"),
        ("a.csv", "prompt,seed\n", "a.csv: no prompt in it: the first line names the columns"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": "b"', "a.jsonl line 2: not JSON: Expecting ',' delimiter"),
        ("a.jsonl", '{"prompt": "a", "prompt": "b"}', "a.jsonl line 1: not JSON: 'prompt' is set twice"),
        ("a.jsonl", '["a"]', "a.jsonl line 1: not an object of fields"),
        ("a.jsonl", '{"prompt": ["a", "b"]}', "a.jsonl line 1: prompt: ['a', 'b'] is not text"),
        ("a.jsonl", '{"prompt": "a", "seed": [1]}', "a.jsonl line 1: seed: [1] is not a whole number"),
        ("a.jsonl", '{"prompt": "a", "seed": true}', "a.jsonl line 1: seed: true is not a whole number"),
        ("a.jsonl", '{"prompt": "a", "cache": "none"}', "a.jsonl line 1: cache: unknown field."),
        ("a.jsonl", "[" * 100_000, "a.jsonl line 1: not JSON: nested more than 32 levels deep"),
        ("a.txt", "# nothing\n", "a.txt: no prompt in it: one per line; lines that start with # are comments"),
        ("a.txt", b"\xff", "a.txt: not UTF-8 text"),
        ("a.yaml", "prompt: a", "a.yaml: its name ends in none of .txt, .csv, .jsonl"),
    ],
)
def test_a_mistake_is_named_by_its_line(tmp_path, name, content, message):
    assert message in complaint(tmp_path, name, content)


def test_mistakes_of_all_lines_come_at_once_and_the_rest_are_counted(tmp_path):
    content = "prompt,seed\n" + "a,x\n" * 30
    lines = complaint(tmp_path, "a.csv", content).splitlines()
    assert lines[0] == "a.csv line 2: seed: 'x' is not a whole number"
    assert (len(lines), lines[-1]) == (LISTED + 1, f"… and {30 - LISTED} more")


def test_a_missing_file(tmp_path):
    with pytest.raises(UsageError, match=r"input.prompts=.*nowhere.txt: No such file or directory"):
        prompts.read_prompts(str(tmp_path / "nowhere.txt"))


def test_where_only_prompts_belong_a_line_sets_nothing_else(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "seed": 1}\n')
    with pytest.raises(UsageError, match="line 2: sets seed: here a line can only be a prompt"):
        prompts.read_prompt_texts(str(tmp_path / "a.jsonl"))


def test_more_prompts_than_a_run_draws(tmp_path, monkeypatch):
    monkeypatch.setattr(prompts, "MAX_PICTURES", 3)
    assert len(read(tmp_path, "a.txt", "a\n" * 3)) == 3
    assert complaint(tmp_path, "a.txt", "a\n" * 4) == "input.prompts=a.txt: more than 3 prompts; split the file"
