"""Scores on disk, one line of JSON each, so that a search that was stopped goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydrarun.cache.search import Steps
from hydrarun.errors import UsageError


class Ledger:
    """The scores in `file`, by steps. Its first line says what they are scores of."""

    def __init__(self, file: Path, identity: Mapping[str, Any]) -> None:
        """Begins `file`, or continues it: a last line that was cut off is dropped.

        Raises `UsageError` for a file of another `identity` (what JSON can hold), and a damaged one.
        """
        self.file = file
        self.scores: dict[Steps, float] = {}
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = whole_lines(file)
        if not lines:
            self._append(identity)
            return
        self._check(self._read(1, lines[0]), json.loads(json.dumps(identity)))
        for number, line in enumerate(lines[1:], start=2):
            try:
                row = self._read(number, line)
                self.scores[tuple(row["steps"])] = float(row["score"])
            except (KeyError, TypeError):
                raise self._damaged(number) from None

    def add(self, steps: Steps, score: float) -> None:
        """Keep a score; when this returns the disk has it."""
        self.scores[steps] = score
        self._append({"steps": steps, "score": score})

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

    def _check(self, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
        other = sorted(key for key in {*theirs, *ours} if theirs.get(key) != ours.get(key))
        if other:
            raise UsageError(
                f"{self.file}: its scores are of another configuration ({', '.join(other)}); choose another folder:"
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
    return whole.splitlines()
