"""The scores of a search on disk, so that one that was stopped goes on where it was."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydrarun.engine.calibration.search import Steps
from hydrarun.outputs.journal import Ledger


class ScoreLedger:
    """Scores by steps, in `file`."""

    def __init__(self, file: Path, identity: Mapping[str, Any]) -> None:
        """Raises `UsageError` for a file of another `identity` (what JSON can hold), and a damaged one."""
        self.ledger = Ledger(file, identity, "scores")
        self.scores: dict[Steps, float] = {}
        for number, row in enumerate(self.ledger.rows):
            try:
                self.scores[tuple(row["steps"])] = float(row["score"])
            except (KeyError, TypeError):
                raise self.ledger.damage_error(number) from None

    def add(self, steps: Steps, score: float) -> None:
        """Keep a score; when this returns the disk has it."""
        self.scores[steps] = score
        self.ledger.add({"steps": steps, "score": score})
