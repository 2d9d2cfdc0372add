"""YAML is data of bounded depth: no tags, no aliases, no numbers that Python cannot print."""

from __future__ import annotations

import pytest

from hydrarun.core.strict_json import MAX_DEPTH
from hydrarun.core.strict_yaml import dump_yaml, parse_yaml

PLAIN = {"a": [1, 2.5, 1e-3, True, None, "text", "1e3", "2024-01-01"], "b": {"c": {}}, "d": "!not a tag", "e": "*x"}


def test_what_is_written_is_read():
    assert parse_yaml(dump_yaml(PLAIN)) == PLAIN


@pytest.mark.parametrize(("opened", "closed"), [("[", "]"), ("{a: ", "}"), ("[{a: ", "}]")])
def test_depth(opened, closed):
    levels = opened.count("[") + opened.count("{")
    most = MAX_DEPTH // levels
    parse_yaml(opened * most + "1" + closed * most)
    for count in (most + 1, 200, 20_000):
        with pytest.raises(ValueError, match="line 1: nested more than 32 levels deep"):
            parse_yaml(opened * count + "1" + closed * count)


@pytest.mark.parametrize("one", ["- ", "? ", "a:\n"])
def test_depth_without_brackets(one):
    lines = (" " * level + one for level in range(300)) if one.endswith("\n") else (one for _ in range(300))
    with pytest.raises(ValueError, match=r"line \d+: nested more than 32 levels deep"):
        parse_yaml("".join(lines) + ("x" if one != "a:\n" else ""))


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system [x]",
        "a: !!python/name:os.system",
        "a: !!binary aGVsbG8=",
        "a: !!set {b, c}",
        "a: !!str 5",
        "a: !own {b: 1}",
        "a: ! 5",
        "!!str a: 5",
        "a: [!<tag:yaml.org,2002:int> 5]",
        "a: !!omap [b: 1]",
    ],
)
def test_tags_are_refused(text):
    with pytest.raises(ValueError, match=r"^line 1: tags are not allowed$"):
        parse_yaml(text)


@pytest.mark.parametrize("text", ["a: &x 1\nb: *x", "a: &x [*x]", "a: &x {b: 1}\nc: {<<: *x}"])
def test_aliases_are_refused(text):
    with pytest.raises(ValueError, match=r"^line \d: aliases are not allowed$"):
        parse_yaml(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("9" * 5000, "line 1: '9{40}': not a number"),
        ("0x" + "f" * 60_000, "line 1: a number of too many digits"),
        ("0x_", "line 1: '0x_': not a number"),
        ("a: 1\na: 2", "line 2: 'a' is set twice"),
        ("? [a]\n: b", "line 1: found unhashable key"),
        ("=", "line 1: could not determine a constructor"),
        ("a: [", "line 1"),
        ("a: 1\n---\nb: 2", "line 2"),
        ("a: \x07", "special characters are not allowed"),
        (b"\xff", "not UTF-8 text"),
    ],
    ids=lambda value: str(value)[:12],
)
def test_what_is_refused(text, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse_yaml(text)
    assert "\n" not in str(caught.value)
