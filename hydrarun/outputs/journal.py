"""What was done, one line of JSON for each thing, so that work that was stopped goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydrarun.core.errors import UsageError


class Ledger:
    """The rows in `file`, in order. Its first line says what they are about."""

    def __init__(self, file: Path, identity: Mapping[str, Any], rows_of: str) -> None:
        """Begins `file`, or continues it: a last line that was cut off is dropped. `rows_of` names rows to the user.

        Raises `UsageError` for a file of another `identity` (what JSON can hold), and a damaged one.
        """
        self.file = file
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = whole_lines(file)
        self.rows = [self._read(number, line) for number, line in enumerate(lines, start=1)][1:]
        if lines:
            self._check(self._read(1, lines[0]), json.loads(json.dumps(identity)), rows_of)
        else:
            self._append(identity)

    def add(self, row: Mapping[str, Any]) -> None:
        """Keep a row; when this returns the disk has it."""
        self._append(row)
        self.rows.append(dict(row))

    def damaged(self, row: int) -> UsageError:
        """What to raise for a row (counted from 0) that cannot be understood."""
        return self._damaged(row + 2)

    def _append(self, row: Mapping[str, Any]) -> None:
        with self.file.open("ab") as file:
            file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def _read(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise self._damaged(number)
        return row

    def _check(self, theirs: Mapping[str, Any], ours: Mapping[str, Any], rows_of: str) -> None:
        other = sorted(key for key in {*theirs, *ours} if theirs.get(key) != ours.get(key))
        if other:
            raise UsageError(
                f"{self.file}: its {rows_of} are of another configuration ({', '.join(other)}); choose another folder:"
                " hydra.run.dir=…"
            )

    def _damaged(self, number: int) -> UsageError:
        return UsageError(f"{self.file}: line {number} is damaged; delete the file, or choose another hydra.run.dir=…")


def whole_lines(file: Path) -> list[bytes]:
    """The lines of a file, empty where there is none; what follows the last line break is cut off, on disk too."""
    if not file.exists():
        return []
    content = file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(file, len(whole))
    return whole.split(b"\n")[:-1]
