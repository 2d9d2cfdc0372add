"""The settings of a calibration."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple


class CalibrationJob(NamedTuple):
    """A calibration of one cache for one model."""

    config: dict[str, Any]  # checked, without a cache
    cache: dict[str, Any]  # the node of the cache to calibrate
    prompts: list[str]
    folder: Path
    words: list[str]  # command-line arguments that a run with the result needs too
    budget: float  # share of computed steps, for a mask
    evaluations: int  # maximum number of masks to try

    def option(self, kind: str) -> Path:
        """Return the file of the option to write."""
        name = re.sub(r"\W+", "_", self.config["model"]["name"])
        return self.folder / "cache" / f"{kind}_{name}.yaml"

    def command(self, file: Path) -> str:
        """Return the command line that draws with the option in `file`."""
        return shlex.join(["hydrarun", "--config-dir", str(self.folder), *self.words, f"cache={file.stem}"])
