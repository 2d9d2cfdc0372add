"""Keeps the scores of a search on disk, so that an interrupted search continues where it stopped."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydrarun.engine.calibration.search import Steps
from hydrarun.outputs.journal import Ledger


class ScoreLedger:
    """Scores by computed steps, stored in `file`."""

    def __init__(self, file: Path, identity: Mapping[str, Any]) -> None:
        """Open or create `file`. Raises `UsageError` if it is damaged, or of another `identity` (JSON data)."""
        self.ledger = Ledger(file, identity, "scores")
        self.scores: dict[Steps, float] = {}
        for number, row in enumerate(self.ledger.rows):
            try:
                self.scores[tuple(row["steps"])] = float(row["score"])
            except (KeyError, TypeError):
                raise self.ledger.damage_error(number) from None

    def add(self, steps: Steps, score: float) -> None:
        """Add a score. When this returns, it is on disk."""
        self.scores[steps] = score
        self.ledger.add({"steps": steps, "score": score})
