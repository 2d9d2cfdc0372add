"""JSON that later code could not handle is refused while it is parsed, with one line."""

from __future__ import annotations

import json

import pytest

from hydrarun.core.strict_json import CONSTANTS, INFINITE, MAX_DEPTH, parse_json, read_json, read_json_object

VALUES = [{"a": [1, -2.5, True, None, "ü"], "b": {"c": {}}}, [], "text", 0, 1e300, 2**80]


@pytest.mark.parametrize("value", VALUES, ids=str)
def test_plain_values(value):
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False).encode()):
        assert parse_json(text) == value


@pytest.mark.parametrize(("opened", "closed"), [("[", "]"), ('{"a":', "}"), ('[{"a":', "}]")])
def test_depth(opened, closed):
    levels = opened.count("[") + opened.count("{")
    most = MAX_DEPTH // levels
    parse_json(opened * most + "1" + closed * most)
    parse_json(opened * most + '"\\ud83d\\ude00"' + closed * most)
    for count in (most + 1, 500, 100_000):
        with pytest.raises(ValueError, match="nested more than 32 levels deep"):
            parse_json(opened * count + "1" + closed * count)
        with pytest.raises(ValueError, match="nested more than 32 levels deep"):
            parse_json(opened * count + '"\\ud83d\\ude00"' + closed * count)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Expecting value"),
        ("{", "Expecting property name"),
        ("[1] [2]", "Extra data"),
        (b"\xff", "not UTF-8 text"),
        ('{"a": 1, "b": 2, "a": 1}', "'a' is set twice"),
        ('[{"x": {"a": 1, "a": 1}}]', "'a' is set twice"),
        ("9" * 4301, "a number of too many digits"),
        ('["\\ud83d"]', "half of a surrogate pair"),
        ('{"\\uDE00": 1}', "half of a surrogate pair"),
        ('{"a": [["\\ude00\\ud83d"]]}', "half of a surrogate pair"),
        ("NaN", "NaN is not a number"),
        ("[-Infinity]", "-Infinity is not a number"),
        ("1e999", "too large a number"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_is_refused(text, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse_json(text)
    assert "\n" not in str(caught.value)


def test_infinity_where_libraries_write_it():
    assert parse_json("[-Infinity, 1e999]", INFINITE) == [float("-inf"), float("inf")]
    with pytest.raises(ValueError, match="NaN is not a number"):
        parse_json("[NaN]", INFINITE)
    assert str(parse_json("[NaN]", CONSTANTS)) == "[nan]"


def test_many_keys_of_which_the_last_is_repeated():
    """Not quadratic: finding the repeated key of 200,000 takes as long as reading them."""
    keys = ", ".join(f'"{number}": 0' for number in range(200_000))
    with pytest.raises(ValueError, match="'199999' is set twice"):
        parse_json(f'{{{keys}, "199999": 0}}')


def test_files(tmp_path):
    file = tmp_path / "x.json"
    file.write_text('{"a": 1}')
    assert read_json(file, 100) == read_json_object(file, 100) == {"a": 1}
    with pytest.raises(OSError, match="larger than 7 bytes"):
        read_json(file, 7)
    file.write_text("[1]")
    with pytest.raises(ValueError, match="not an object"):
        read_json_object(file, 100)
