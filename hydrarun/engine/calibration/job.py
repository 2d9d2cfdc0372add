"""What a calibration is asked for."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple


class CalibrationJob(NamedTuple):
    """What is calibrated."""

    config: dict[str, Any]  # checked, without a cache
    cache: dict[str, Any]  # the node of the one that is calibrated
    prompts: list[str]
    folder: Path
    words: list[str]  # of the command line, those that a run with the result needs too
    budget: float  # share of computed steps, for a mask
    evaluations: int  # most masks that are tried

    def option(self, kind: str) -> Path:
        """The file of the option that comes out."""
        name = re.sub(r"\W+", "_", self.config["model"]["name"])
        return self.folder / "cache" / f"{kind}_{name}.yaml"

    def command(self, file: Path) -> str:
        """The line that draws with what was written."""
        return shlex.join(["hydrarun", "--config-dir", str(self.folder), *self.words, f"cache={file.stem}"])
