"""An append-only file of JSON lines, one per finished item, so that interrupted work can be resumed."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydrarun.core.errors import UsageError
from hydrarun.core.files import open_file
from hydrarun.core.strict_json import CONSTANTS, parse_json
from hydrarun.outputs.run_folder import translate_file_errors

MAX_BYTES = 2**30  # of one ledger: about a million pictures


class Ledger:
    """The rows of `file`, in order. The first line is not a row: it holds the configuration that the rows belong to."""

    def __init__(self, file: Path, identity: Mapping[str, Any], rows_of: str) -> None:
        """Create or read `file`; an incomplete last line is cut off. `rows_of` names the rows in error messages.

        Raises UsageError for a damaged file, and for a file with another `identity` (JSON-serializable).
        """
        self.file = file
        self.rows: list[dict[str, Any]] = []
        #: number of bytes of the file that are read into `rows`
        self._end = 0
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            lines = self._read_new_lines() if os.path.lexists(file) else []
        except OSError as error:
            raise UsageError(f"{file}: {error.strerror}; choose another folder: hydra.run.dir=…") from None
        if lines:
            found, *self.rows = [self._parse_row(number, line) for number, line in enumerate(lines, start=1)]
            self._check_identity(found, json.loads(json.dumps(identity)), rows_of)
        else:
            self._end = append_row(file, identity)

    def refresh(self) -> None:
        """Read the rows that another writer has appended since the last read; an incomplete last line is cut off.

        Raises WriteError if the file is gone or another one is in its place.
        """
        with translate_file_errors(self.file):
            if self.file.stat().st_size < self._end:
                raise OSError(errno.ESTALE, "another file has taken its place")
            lines = self._read_new_lines()
        self.rows += [self._parse_row(number, line) for number, line in enumerate(lines, start=len(self.rows) + 2)]

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row and flush it to disk. Call `refresh` first if another writer may have appended rows."""
        self._end += append_row(self.file, row)
        self.rows.append(dict(row))

    def damage_error(self, row: int) -> UsageError:
        """Return the error to raise for an invalid row (counted from 0)."""
        return self._line_error(row + 2)

    def _read_new_lines(self) -> list[bytes]:
        lines = read_whole_lines(self.file, self._end)
        self._end += sum(len(line) + 1 for line in lines)
        return lines

    def _parse_row(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            row = parse_json(line, CONSTANTS)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise self._line_error(number)
        return row

    def _check_identity(self, theirs: Mapping[str, Any], ours: Mapping[str, Any], rows_of: str) -> None:
        other = sorted(key for key in {*theirs, *ours} if theirs.get(key) != ours.get(key))
        if other:
            raise UsageError(
                f"{self.file}: its {rows_of} are of another configuration ({', '.join(other)}); choose another folder:"
                " hydra.run.dir=…"
            )

    def _line_error(self, number: int) -> UsageError:
        return UsageError(f"{self.file}: line {number} is damaged; delete the file, or choose another hydra.run.dir=…")


def append_row(file: Path, row: Mapping[str, Any]) -> int:
    """Append a row to a ledger without reading it and flush it to disk; returns the number of bytes written.

    Raises WriteError, after which no part of the row is in the file.
    """
    line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
    with translate_file_errors(file), file.open("ab") as opened:
        size = opened.tell()
        try:
            opened.write(line)
            opened.flush()
            os.fsync(opened.fileno())
        except OSError:
            opened.truncate(size)
            raise
    return len(line)


def read_whole_lines(file: Path, start: int) -> list[bytes]:
    """Return the lines of a file from byte `start` on, without line breaks. Truncates an incomplete last line."""
    with open_file(file, MAX_BYTES) as opened:
        opened.seek(start)
        content = opened.read(MAX_BYTES)
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(file, start + len(whole))
    return whole.split(b"\n")[:-1]
