"""Free text survives the command line: through Hydra's parser, through a composition, and through a sweep."""

import random
import re

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from hydrarun.config.compose import compose_unchecked
from hydrarun.core.errors import UsageError
from hydrarun.core.quoting import escape_interpolation, quote_overrides

NASTY = [
    "a cat",
    "a cat, sitting",
    " leading and trailing ",
    "\ttab",
    "two\nlines\r\n",
    "it's raining",
    'say "hi, you"',
    "'a' and 'b'",
    '"a" and "b"',
    '"a","b"',
    '"open',
    "(round)",
    "[red] cat",
    "[red",
    "red]",
    "[]x",
    "[a, [b]]",
    "[1, 2]",
    "[一只猫, 狗]",
    "{a: b}",
    "{",
    "a=b",
    "=",
    "==",
    ",",
    "a,b,c",
    "# no comment",
    "a # b",
    "50% off!",
    "a;b&c|d<e>f",
    "null",
    "Null",
    "true",
    "123",
    "1.0",
    "1e5",
    "0x10",
    "2020-01-01",
    "inf",
    "nan",
    "~",
    "一只猫，坐着",
    "日本語「猫」",
    "😀 café ñ",
    "back\\slash",
    "ends with \\",
    "ends with \\\\",
    "\\",
    "\\\\",
    "\\n is not a newline",
    'quote after \\" backslash',
    '\\\\"',
    "a\\,b",
    "$5",
    "$",
    "$$",
    "${x}",
    "${ b",
    "a ${b} c ${",
    "${oc.env:HOME}",
    "${${x}}",
    "$${x}",
    "\\${x}",
    "\\\\${x}",
    "\\\\\\${x} \\",
    "${x}\\",
    "choice(a",
    "choice of (a, b)",
    "a choice(b)",
    "range(1,3)",
    "glob(*)",
    "interval(0,1)",
    "sort(3,2)",
    "@here",
    "+x",
    "a:b",
    "---",
    "- a",
    "? a",
    "!!python/object:os.system",
    "&a *a",
    "...",
    "%s {} {{x}}",
    "<lora:x:1>",
    "--help",
    "sampling.seed=3",
]

PARSER = OverridesParser.create()
KEYS = ["sampling.prompt", "sampling.negative_prompt"]


def parsed(text: str, key: str = "sampling.prompt"):
    """Return the value that Hydra and OmegaConf read from the quoted override."""
    override = PARSER.parse_override(quote_overrides([f"{key}={text}"])[0])
    assert not override.is_sweep_override()
    return OmegaConf.to_container(OmegaConf.create({"value": override.value()}), resolve=True)["value"]


@pytest.mark.parametrize("text", NASTY)
@pytest.mark.parametrize("key", KEYS)
def test_text_passes_the_parser_unharmed(text, key):
    assert parsed(text, key) == (None if text == "null" and key.endswith("negative_prompt") else text)


def test_random_text_passes_the_parser_unharmed():
    random.seed(0)
    alphabet = "ab ,'\"()[]{}=#$\\:\n猫!~+-1"
    for _ in range(800):
        # a letter on each side, so that it is never a whole list or one quoted string
        text = "a" + "".join(random.choices(alphabet, k=random.randrange(12))) + random.choice(["b", "\\", '"', "$"])
        assert parsed(text) == text
        assert OmegaConf.to_container(OmegaConf.create({"x": escape_interpolation(text)}), resolve=True)["x"] == text


def test_text_passes_a_composition_unharmed():
    for text in NASTY[::3]:
        config, _ = compose_unchecked(
            quote_overrides([f"sampling.prompt={text}", f"++sampling.negative_prompt={text}"])
        )
        negative = None if text == "null" else text
        assert (config["sampling"]["prompt"], config["sampling"]["negative_prompt"]) == (text, negative)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("[a,b]", ["a", "b"]),
        ('["a, b","c"]', ["a, b", "c"]),
        ("[a cat, a dog]", ["a cat", "a dog"]),
        ("[red]", ["red"]),
        ('["一只猫","${x}","it\'s"]', ["一只猫", "${x}", "it's"]),
        ('["[a,b]"]', ["[a,b]"]),
        ("[]", []),
        ('"a, b"', "a, b"),
        ("'a, b'", "a, b"),
        ('"${x}"', "${x}"),
        ('"null"', "null"),
        ("''", ""),
        ("", ""),
        (" ", " "),
        ('" "', " "),
        ("'\"quoted\"'", '"quoted"'),
    ],
)
def test_lists_and_quoted_strings_of_hydras_grammar(value, expected):
    assert parsed(value) == expected


@pytest.mark.parametrize(
    ("value", "points"),
    [
        ('choice("a, b","c")', ["a, b", "c"]),
        ("choice(a, b)", ["a", "b"]),
        ('choice("${x}","一只猫","null","1")', ["${x}", "一只猫", "null", "1"]),
        ('choice(["a","b"],c)', [["a", "b"], "c"]),
    ],
)
def test_only_choice_sweeps(value, points):
    override = PARSER.parse_override(quote_overrides([f"sampling.prompt={value}"])[0])
    lines = [f"sampling.prompt={point}" for point in override.sweep_string_iterator()]
    values = [compose_unchecked([line])[0]["sampling"]["prompt"] for line in lines]
    assert values == points


@pytest.mark.parametrize("value", ["choice(一,二)", "choice(a, 1)", "choice(a, it's)", "choice()"])
def test_a_choice_that_cannot_be_read_is_refused(value):
    with pytest.raises(UsageError, match="write each text in quotes"):
        quote_overrides([f"sampling.prompt={value}"])


def test_null_is_a_text_for_the_prompt_and_none_for_the_negative_prompt():
    assert parsed("null") == "null"
    assert parsed("null", "sampling.negative_prompt") is None
    assert parsed('"null"', "sampling.negative_prompt") == "null"


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("model.path=/a (b)/c", "/a (b)/c"),
        ("model.path=/数据/x", "/数据/x"),
        ("recipe=~/my recipes/x.yaml", "~/my recipes/x.yaml"),
        ("sampling.seed=[1,2", "[1,2"),
        ("sampling.height=64", 64),
        ("sampling.seed=[1,2]", [1, 2]),
        ("model.revision=null", None),
    ],
)
def test_other_keys_are_text_only_where_the_grammar_cannot_read_them(override, value):
    assert PARSER.parse_override(quote_overrides([override])[0]).value() == value


def test_what_is_no_assignment_is_left_alone():
    assert quote_overrides(["~model", "word", "sampling..height=3"]) == ["~model", "word", "sampling..height=3"]


def test_bytes_that_are_not_utf8_are_refused():
    with pytest.raises(UsageError, match="not valid UTF-8"):
        quote_overrides(["sampling.prompt=\udcff"])


IMAGES = "input.images"
# all texts except lists and null
PATHS = ["/data/a (1).png", "choice(1).png", *(text for text in NASTY if not re.fullmatch(r"\[.*\]|null", text))]


@pytest.mark.parametrize("path", PATHS)
def test_one_path_is_taken_to_the_letter(path):
    assert parsed(path, IMAGES) == [path]
    assert parsed(path, f"++{IMAGES}") == [path]


@pytest.mark.parametrize("path", [path.strip() for path in PATHS if "," not in path])
def test_paths_of_a_list_are_taken_to_the_letter(path):
    assert parsed(f"[{path}, b c.png]", IMAGES) == [path, "b c.png"]
    assert parsed(f"[b c.png,{path}]", IMAGES) == ["b c.png", path]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("[a.png,b c.png]", ["a.png", "b c.png"]),
        ("[ a.png , b.png ]", ["a.png", "b.png"]),
        ('["a, b.png",c.png]', ["a, b.png", "c.png"]),
        ("[c.png, 'a, \"b\".png' ]", ["c.png", 'a, "b".png']),
        ('["a \\", b.png","c\\\\"]', ['a ", b.png', "c\\"]),
        ("['it\\'s, a.png']", ["it's, a.png"]),
        ('["${x}",${y}]', ["${x}", "${y}"]),
        ('["[a],b"]', ["[a],b"]),
        ("['a' and 'b',c]", ["'a' and 'b'", "c"]),
        ('["open, b]', ['"open', "b"]),
        ("[null]", ["null"]),
        ("[]", []),
        ("[ ]", []),
        ('"a, b.png"', ["a, b.png"]),
        ("'[a, b]'", ["[a, b]"]),
        ("a.png,b.png", ["a.png,b.png"]),
        ("null", None),
        ('"null"', ["null"]),
    ],
)
def test_lists_of_paths(value, expected):
    assert parsed(value, IMAGES) == expected


def test_random_paths_pass_the_parser_unharmed():
    random.seed(0)
    alphabet = "ab '\"()[]{}=#$\\:猫!~+-1"
    for _ in range(400):
        one, other = ("a" + "".join(random.choices(alphabet, k=random.randrange(12))) + "b" for _ in range(2))
        assert parsed(one, IMAGES) == [one]
        assert parsed(f"[{one},{other}]", IMAGES) == [one, other]


@pytest.mark.parametrize("value", ["[a.png,]", "[,a.png]", "[a.png,,b.png]", "[,]"])
def test_an_empty_place_in_a_list_of_paths_is_refused(value):
    with pytest.raises(UsageError) as caught:
        quote_overrides([f"{IMAGES}={value}"])
    message = f"input.images: {value} has an empty place: take out a comma, or quote a path that holds one."
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("value", "points"),
    [
        ("choice(a.png, b.png)", [["a.png"], ["b.png"]]),
        ('choice("a (1), 2.png",["b.png","猫.png"])', [["a (1), 2.png"], ["b.png", "猫.png"]]),
    ],
)
def test_choice_sweeps_over_paths(value, points):
    override = PARSER.parse_override(quote_overrides([f"{IMAGES}={value}"])[0])
    assert override.is_sweep_override()
    lines = [f"{IMAGES}={point}" for point in override.sweep_string_iterator()]
    assert [PARSER.parse_override(line).value() for line in lines] == points


@pytest.mark.parametrize("value", ["choice(a (1).png,b.png)", "choice(a.png, 1)", "choice([a.png, null])"])
def test_a_choice_of_paths_that_cannot_be_read_is_refused(value):
    with pytest.raises(UsageError, match=r"^input\.images: .*: write each text in quotes, input\.images=choice\("):
        quote_overrides([f"{IMAGES}={value}"])


def test_a_number_that_python_does_not_read_is_text():
    digits = "9" * 5000
    assert parsed(f"[{digits}]") == f"[{digits}]"
    assert PARSER.parse_override(quote_overrides([f"sampling.height={digits}"])[0]).value() == digits
