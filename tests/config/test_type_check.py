# ruff: noqa: UP007, UP045 - both spellings of a union must work
from typing import Any, Literal, Optional, Union

import pytest

from hydrarun.config.type_check import describe_hint, format_value, matches_hint


@pytest.mark.parametrize(
    ("value", "hint", "good"),
    [
        (1, int, True),
        (True, int, False),
        (1.0, int, False),
        (1, float, True),
        (False, float, False),
        ("1", float, False),
        ("a", str, True),
        (1, bool, False),
        (None, Optional[int], True),
        (None, int, False),
        ("a", int | None, False),
        ("a", Union[int, str], True),
        ("a", Literal["a", "b"], True),
        ("c", Literal["a", "b"], False),
        ([{"a": 1}], list[dict[str, Any]], True),
        (["a"], list[dict[str, Any]], False),
        ({"a": "x"}, dict[str, int], False),
        ({}, list[str], False),
        (object(), Any, True),
    ],
)
def test_fits(value, hint, good):
    assert matches_hint(value, hint) is good


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (int, "a whole number"),
        (Optional[float], "a number or null"),
        (str | None, "text or null"),
        (Literal["a", "b"], "one of a, b"),
        (list[dict[str, Any]], "a list of a mapping of anything"),
    ],
)
def test_describe(hint, words):
    assert describe_hint(hint) == words


def test_show_writes_values_as_yaml_does():
    assert [format_value(value) for value in (True, None, 2, "a")] == ["true", "null", "2", "'a'"]
