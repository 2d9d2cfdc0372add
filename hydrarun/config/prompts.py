"""Reads `input.prompts`: a file of prompts as text (one prompt per line), CSV (columns) or JSON lines (objects).

A line of CSV or JSON may set any field of `sampling`, and `images`, its own input images. Image paths are relative to
the folder of the file, so that both can be moved together.
"""

from __future__ import annotations

import csv
import io
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydrarun.config.bounds import MAX_PICTURES
from hydrarun.config.schema import Sampling
from hydrarun.config.type_check import describe_hint, format_value, matches_hint
from hydrarun.core.errors import UsageError, raise_mistakes, suggest_name
from hydrarun.core.files import MAX_TEXT_BYTES, expand_home, read_file
from hydrarun.core.strict_json import parse_json

#: the fields of a line and their types; a line has one value where `sampling` also takes lists
FIELDS: dict[str, Any] = {
    **typing.get_type_hints(Sampling),
    "prompt": str,
    "negative_prompt": str | None,
    "seed": int,
    "images": str | list[str] | None,
}

#: an additional key of each line: its line number in the file, from 1
LINE = "line"

#: most lines of a file, comments and blank ones included, and mistakes after which the rest is not read
MAX_LINES = 10 * MAX_PICTURES
MAX_MISTAKES = 1_000

#: separates paths in a CSV cell
SEPARATOR = ";"

Line = dict[str, Any]
Numbered = Iterator[tuple[int, Any]]


def read_prompts(name: str) -> list[Line]:
    """Read the lines of a file: their fields, and `line`. Raises UsageError that lists every bad line."""
    path = expand_home(name)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise UsageError(f"input.prompts={name}: its name ends in none of {', '.join(READERS)}")
    text = _read_text(name, path)
    if text.count("\n") > MAX_LINES:
        raise UsageError(f"input.prompts={name}: more than {MAX_LINES} lines; split the file")
    lines: list[Line] = []
    mistakes: list[str] = []
    for number, fields in reader(text, name):
        found = list(find_line_problems(fields))
        mistakes += [f"{name} line {number}: {problem}" for problem in found]
        if len(mistakes) > MAX_MISTAKES:
            break
        if not found:
            lines.append({LINE: number, **_resolve_image_paths(fields, path.parent)})
        if len(lines) > MAX_PICTURES:
            raise UsageError(f"input.prompts={name}: more than {MAX_PICTURES} prompts; split the file")
    raise_mistakes(mistakes)
    if not lines:
        raise UsageError(f"input.prompts={name}: no prompt in it{HINTS[path.suffix.lower()]}")
    return lines


def read_prompt_texts(name: str) -> list[str]:
    """Read the prompts of a file whose lines set nothing else. Raises UsageError for other fields."""
    lines = read_prompts(name)
    for line in lines:
        if more := sorted(line.keys() - {LINE, "prompt"}):
            raise UsageError(f"{name} line {line[LINE]}: sets {', '.join(more)}: here a line can only be a prompt")
    return [line["prompt"] for line in lines]


def find_line_problems(fields: Any) -> Iterator[str]:
    """Yield what is wrong with the fields of one line."""
    if not isinstance(fields, dict):
        yield f'not an object of fields, such as {{"prompt": "a red circle"}}: {format_value(fields)}'
        return
    for name, value in fields.items():
        if name not in FIELDS:
            yield describe_unknown_field(name)
        elif not matches_hint(value, FIELDS[name]):
            yield f"{name}: {format_value(value)} is not {describe_hint(FIELDS[name])}"
    if not fields.get("prompt") and "images" not in fields:  # some models need only images
        yield "no prompt"


def describe_unknown_field(name: str) -> str:
    """Return the message for an unknown field."""
    return f"{name}: unknown field.{suggest_name(name, FIELDS)} Known: {', '.join(FIELDS)}"


def _read_text(name: str, path: Path) -> str:
    try:
        return read_file(path, MAX_TEXT_BYTES).decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"input.prompts={name}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"input.prompts={name}: not UTF-8 text") from None


def _iterate_lines(text: str) -> Numbered:
    """Yield the number and stripped text of each line that is not blank. Splits at newlines only."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line.strip()


def _parse_plain_text(text: str, name: str) -> Numbered:
    """Read one prompt per line. Lines that start with `#` are comments."""
    return ((number, {"prompt": line}) for number, line in _iterate_lines(text) if not line.startswith("#"))


def _parse_csv(text: str, name: str) -> Numbered:
    """Read CSV: the first line names the fields, and an empty cell leaves its field unset."""
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    number = 1
    try:
        for row in rows:
            if any(cell.strip() for cell in row):
                if header is None:
                    header = _check_header([cell.strip() for cell in row], f"{name} line {number}")
                elif len(row) != len(header):
                    raise UsageError(f"{name} line {number}: {len(row)} cells, and the first line names {len(header)}")
                else:
                    yield number, {key: _parse_cell(key, cell) for key, cell in zip(header, row, strict=True) if cell}
            number = rows.line_num + 1
    except csv.Error as error:
        raise UsageError(f"{name} line {number}: {error}") from None


def _check_header(names: list[str], where: str) -> list[str]:
    raise_mistakes(f"{where}: {describe_unknown_field(name)}" for name in names if name not in FIELDS)
    raise_mistakes(f"{where}: {name}: two columns of it" for name in names if names.count(name) > 1)
    return names


def _parse_cell(name: str, cell: str) -> Any:
    """Convert a cell to its field's type. Text that is not a number stays text, and the type check refuses it."""
    hint = FIELDS[name]
    if matches_hint("", hint):
        return [path.strip() for path in cell.split(SEPARATOR)] if name == "images" else cell
    for kind in (int, float):
        if matches_hint(kind(), hint):
            try:
                return kind(cell)
            except ValueError:
                pass
    return cell


def _parse_json_lines(text: str, name: str) -> Numbered:
    """Read one JSON object per line."""
    for number, line in _iterate_lines(text):
        try:
            yield number, parse_json(line)
        except ValueError as error:
            raise UsageError(f"{name} line {number}: not JSON: {error}") from None


def _resolve_image_paths(fields: Line, folder: Path) -> Line:
    """Return the fields with `prompt`, empty if unset, and with image paths relative to the current folder."""
    fields = {"prompt": "", **fields}
    images = fields.get("images")
    if not images:
        return fields
    paths = [images] if isinstance(images, str) else images
    return {**fields, "images": [path if "://" in path else str(folder / expand_home(path)) for path in paths]}


READERS = {".txt": _parse_plain_text, ".csv": _parse_csv, ".jsonl": _parse_json_lines}

HINTS = {
    ".txt": ": one per line; lines that start with # are comments",
    ".csv": ": the first line names the columns, prompt,seed,… and each other line holds a prompt",
    ".jsonl": ': an object in each line, {"prompt": "a red circle"}',
}
