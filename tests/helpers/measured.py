"""Small runs for quality measures: two pictures of the tiny checkpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hydrarun.outputs.media import png
from tests.helpers import tiny

CACHED = ["cache=every_n", "cache.gate.n=3"]
TWO = ["sampling.num_images_per_prompt=2"]
BOTH = "report.metrics=[psnr,ssim]"


def config(folder: Path, twins: Path, *more: str) -> dict:
    return tiny.config(folder, *TWO, f"report.twins={twins}", *more)


def read(folder: Path) -> list[np.ndarray]:
    return [png.read_png(file)[0] for file in sorted(folder.glob("*.png"))]
