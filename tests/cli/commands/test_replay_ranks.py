"""Replaying a picture from several ranks with the same number of ranks, or with one."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from hydrarun.cli import main


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A picture of the demo model, drawn by two ranks."""
    folder = tmp_path_factory.mktemp("drawn")
    asked = ["device=cpu", "parallel=cfg2", "sampling.num_inference_steps=4", f"hydra.run.dir={folder}"]
    assert main.main(asked) == 0
    return next(folder.glob("*.png"))


@pytest.mark.full
def test_by_as_many(drawn, tmp_path, capsys):
    assert main.main(["replay", str(drawn), f"hydra.run.dir={tmp_path}"]) == 0
    assert "identical pixels" in capsys.readouterr().out


def test_by_one(drawn, tmp_path):
    """The pictures differ only by rounding: at most 1 of 255."""
    main.main(["replay", str(drawn), "parallel=none", f"hydra.run.dir={tmp_path}"])
    again = next(tmp_path.glob("*.png"))
    pixels = [np.asarray(Image.open(file)).astype(int) for file in (drawn, again)]
    assert np.abs(pixels[0] - pixels[1]).max() <= 1
