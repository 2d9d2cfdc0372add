"""Free text on the command line: quoted, so that Hydra's grammar does not read it as lists, sweeps or numbers.

`sampling.prompt=` and `sampling.negative_prompt=` take what follows the `=` as text, whatever it holds, except

- `choice("a, b","c")`: a sweep over texts (the only sweep there is for these two keys),
- `[a, b]` and `["a, b","c"]`: a list of texts, if it is one in Hydra's grammar (`[red] cat` is not, so it is text),
- `"a, b"` or `'a, b'`: one quoted string in Hydra's grammar, the habit of Hydra's users: the quotes go,
- `null` for the negative prompt: none.

For any other key, a value that Hydra's grammar cannot read (`model.path=/a (b)`) is text too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException

from hydrarun.errors import UsageError

TEXT_KEYS = ("sampling.prompt", "sampling.negative_prompt")


def literal(overrides: Sequence[str]) -> list[str]:
    """The overrides, quoted where needed so that Hydra hands free text through unchanged. Raises UsageError."""
    return [_literal(override) for override in overrides]


def escape_interpolation(text: str) -> str:
    """Text in which OmegaConf finds no interpolation: it gives back `text` itself when it resolves the result."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def _literal(override: str) -> str:
    try:
        override.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{override!a}: not valid UTF-8.") from None
    key, equals, value = override.partition("=")
    if not equals:
        return override
    if key.lstrip("+") in TEXT_KEYS:
        return f"{key}={_text(key, value)}"
    quoted = f"{key}={QuotedString(value, Quote.double).with_quotes()}"
    return quoted if _parse(override) is None and _parse(quoted) is not None else override


def _text(key: str, value: str) -> str:
    parsed = _parse(f"key={value}") if value.startswith(("'", '"', "[", "choice(")) else None
    if value.startswith("choice(") and value.endswith(")"):
        if parsed is None or not parsed.is_choice_sweep():
            raise UsageError(f'{key}: cannot read {value}: write each text in quotes, {key}=choice("…","…").')
        # as a plain list of values: Hydra forgets the quotes of choice()'s arguments between parsing and the runs
        return ",".join(_item(key, item) for item in parsed.sweep_iterator())
    if parsed is not None and not parsed.is_sweep_override():
        content = parsed.value()
        if isinstance(content, str) or all(isinstance(item, str) for item in content):
            return _item(key, content)
    if value == "null" and key.endswith("negative_prompt"):
        return value
    return _item(key, value)


def _item(key: str, item: Any) -> str:
    """One parsed element in Hydra's grammar again: text in quotes, a list of texts in brackets, null."""
    if isinstance(item, QuotedString):
        item = item.text
    if isinstance(item, list):
        return "[" + ",".join(_item(key, part) for part in item) + "]"
    if item is None and key.endswith("negative_prompt"):
        return "null"
    if not isinstance(item, str):
        raise UsageError(f'{key}: {item!r} is not text: write each text in quotes, {key}=choice("…","…").')
    return QuotedString(escape_interpolation(item), Quote.double).with_quotes()


def _parse(override: str) -> Override | None:
    try:
        return OverridesParser.create().parse_override(override)
    except HydraException:
        return None
