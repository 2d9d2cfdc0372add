"""Free text on the command line: quoted, so that Hydra's grammar does not read it as lists, sweeps or numbers.

`sampling.prompt=` and `sampling.negative_prompt=` take everything after the `=` as text, except

- `choice("a, b","c")`: a sweep over texts (the only sweep for these two keys),
- `[a, b]` and `["a, b","c"]`: a list of texts, if it is one in Hydra's grammar (`[red] cat` is not, so it is text),
- `"a, b"` or `'a, b'`: one quoted string in Hydra's grammar, as Hydra's users write it; the quotes are removed,
- `null` for the negative prompt: no negative prompt.

`input.images=` takes one literal path, or `[a.png, b c.png]`: literal paths between commas; a path that contains a
comma needs quotes. Both become a list of paths. `null` means no images; `choice("a.png",["b.png","c.png"])` is a sweep.

For any other key, a value that Hydra's grammar cannot read (`model.path=/a (b)`) is also text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException

from hydrarun.core.errors import UsageError

TEXT_KEYS = ("sampling.prompt", "sampling.negative_prompt")
PATHS_KEY = "input.images"

# one path of a list, after the start or a comma: a lone quoted string, or everything up to the next comma
LISTED = re.compile(r"""(?:^|,)(\s*(?:"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')\s*(?=,|\Z)|[^,]*)""")


def quote_overrides(overrides: Sequence[str]) -> list[str]:
    """Quote the overrides where needed so that Hydra passes free text through unchanged. Raises UsageError."""
    return [_quote_override(override) for override in overrides]


def escape_interpolation(text: str) -> str:
    """Escape `text` so that OmegaConf finds no interpolation in it and resolves the result to `text` itself."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def _quote_override(override: str) -> str:
    try:
        override.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{override!a}: not valid UTF-8.") from None
    key, equals, value = override.partition("=")
    if not equals:
        return override
    if key.lstrip("+") in TEXT_KEYS:
        return f"{key}={_quote_text(key, value)}"
    if key.lstrip("+") == PATHS_KEY:
        return f"{key}={_quote_paths(key, value)}"
    quoted = f"{key}={QuotedString(value, Quote.double).with_quotes()}"
    return quoted if _parse_override(override) is None and _parse_override(quoted) is not None else override


def _quote_text(key: str, value: str) -> str:
    if _is_choice(value):
        return ",".join(_format_item(key, point) for point in _read_choices(key, value))
    parsed = _parse_override(f"key={value}") if value.startswith(("'", '"', "[")) else None
    if parsed is not None and not parsed.is_sweep_override():
        content = parsed.value()
        if isinstance(content, str) or all(isinstance(item, str) for item in content):
            return _format_item(key, content)
    if value == "null" and key.endswith("negative_prompt"):
        return value
    return _format_item(key, value)


def _quote_paths(key: str, value: str) -> str:
    if _is_choice(value):
        points = _read_choices(key, value)
        return ",".join(_format_item(key, point if isinstance(point, list) else [point]) for point in points)
    if value == "null":
        return value
    if not (value.startswith("[") and value.endswith("]")):
        return _format_item(key, [_unquote_text(value)])
    content = value[1:-1].strip()
    paths = [path.strip() for path in LISTED.findall(content)] if content else []
    if not all(paths):
        raise UsageError(f"{key}: {value} has an empty place: take out a comma, or quote a path that holds one.")
    return _format_item(key, [_unquote_text(path) for path in paths])


def _unquote_text(text: str) -> str:
    """Return the content of a quoted string of Hydra's grammar, and any other text unchanged."""
    parsed = _parse_override(f"key={text}") if text.startswith(("'", '"')) else None
    return text if parsed is None or parsed.is_sweep_override() else parsed.value()


def _is_choice(value: str) -> bool:
    return value.startswith("choice(") and value.endswith(")")


def _read_choices(key: str, value: str) -> list[Any]:
    """Return the arguments of `choice(…)`, to be quoted again: Hydra drops their quotes between parsing and runs."""
    parsed = _parse_override(f"key={value}")
    if parsed is None or not parsed.is_choice_sweep():
        raise UsageError(f'{key}: cannot read {value}: write each text in quotes, {key}=choice("…","…").')
    return list(parsed.sweep_iterator())


def _format_item(key: str, item: Any) -> str:
    """Format one parsed element in Hydra's grammar: text in quotes, a list of texts in brackets, or null."""
    if isinstance(item, QuotedString):
        item = item.text
    if isinstance(item, list):
        return "[" + ",".join(_format_item(key, part) for part in item) + "]"
    if item is None and key.endswith("negative_prompt"):
        return "null"
    if not isinstance(item, str):
        raise UsageError(f'{key}: {item!r} is not text: write each text in quotes, {key}=choice("…","…").')
    return QuotedString(escape_interpolation(item), Quote.double).with_quotes()


def _parse_override(override: str) -> Override | None:
    try:
        return OverridesParser.create().parse_override(override)
    except (HydraException, RecursionError, ValueError):  # nested too deep; a number of over 4,300 digits
        return None
