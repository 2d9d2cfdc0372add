"""The command that repeats a point, from Hydra's record of its command line."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from functools import cache
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException

from hydrarun.core.quoting import PATHS_KEY, TEXT_KEYS, quote_overrides
from hydrarun.outputs.provenance import redact_text
from hydrarun.outputs.report.collect import Point
from hydrarun.outputs.run_folder import RECORD_FILE


def format_command(point: Point) -> str | None:
    """Format a shell command: the overrides of the point, else a replay of its run.json; None if both are missing."""
    if point.overrides is not None:
        return shlex.join(["hydrarun", *map(requote_override, point.overrides)])
    if point.record:
        return shlex.join(["hydrarun", "replay", RECORD_FILE if point.name == "." else f"{point.name}/{RECORD_FILE}"])
    return None


@cache
def requote_override(override: str) -> str:
    """Convert a recorded override for the `hydrarun` command line. Text is quoted only where it would be ambiguous."""
    key = override.partition("=")[0]
    if key.lstrip("+") not in (*TEXT_KEYS, PATHS_KEY):
        return redact_text(override)
    try:
        content = OverridesParser.create().parse_override(override).value()
    except HydraException:
        return override
    quoted = f"{key}={_quote_content(content)}"
    plain = f"{key}={unescape_interpolation(content)}" if isinstance(content, str) else quoted
    word = plain if quote_overrides([plain]) == quote_overrides([quoted]) else quoted
    return redact_text(word) if key.lstrip("+") == PATHS_KEY else word


def _quote_content(content: Any) -> str:
    """Quote a value in Hydra's grammar, without the escapes that protect `${` from OmegaConf."""
    if isinstance(content, Sequence) and not isinstance(content, str):
        return "[" + ",".join(map(_quote_content, content)) + "]"
    return "null" if content is None else QuotedString(unescape_interpolation(str(content)), Quote.double).with_quotes()


def unescape_interpolation(text: str) -> str:
    """Invert `hydrarun.core.quoting.escape_interpolation`."""
    return re.sub(r"(\\*)\\\$\{", lambda match: match[1][: len(match[1]) // 2] + "${", text)
