"""If the text encoder is offloaded, the prompts of many batches are encoded before it leaves the device."""

from __future__ import annotations

import json

import numpy as np
import pytest

from hydrarun.config.batches import BatchJob
from hydrarun.config.compose import compose_config
from hydrarun.core.progress import Progress
from hydrarun.engine.runner import Runner
from hydrarun.engine.runs import batch_worker
from hydrarun.engine.runs.batch import BatchPlan
from hydrarun.outputs.media import png
from tests.helpers import tiny

TEXTS = ("a", "bb", "ccc")


@pytest.fixture
def config(tiny_folder, tmp_path):
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in TEXTS))
    plain = [word for word in tiny.overrides(tiny_folder) if not word.startswith(("sampling.prompt=", "device="))]
    return lambda *words: compose_config([*plain, f"input.prompts={tmp_path / 'prompts.jsonl'}", *words])


def drawn(config, folder, monkeypatch) -> tuple[list[np.ndarray], list[set[str]]]:
    """Return the pictures of a run on the fake device, and the modules that each swap onloads."""
    folder.mkdir()
    config = {**config, "device": "fake"}
    runner = Runner(config)
    came: list[set[str]] = []
    offload = runner.built.parts.offload
    swap = offload.swap

    def watched(go, come):
        came.append({name for name in come if not offload.waiting[name].here})
        swap(go, come)

    monkeypatch.setattr(offload, "swap", watched)
    plan = BatchPlan(config, folder, Progress(quiet=True))
    plan.draw_all(lambda job: batch_worker.draw_batches(runner, config, BatchJob.from_json(job, config)))
    records = plan.ledger.select_rows("done")
    runner.close()
    return [png.read_png(folder / record["path"])[0] for record in records], came


def test_the_text_encoder_comes_once_for_all_and_pictures_are_the_same(config, fake, tmp_path, monkeypatch):
    plain, _ = drawn(config("offload=none"), tmp_path / "plain", monkeypatch)
    ahead, came = drawn(config("offload=model"), tmp_path / "ahead", monkeypatch)
    assert sum("text_encoder" in names for names in came) == 1
    assert sum("transformer" in names for names in came) == len(TEXTS)
    for one, other in zip(plain, ahead, strict=True):
        assert np.array_equal(one, other)
    monkeypatch.setattr(batch_worker, "ENCODED_AHEAD", 2)
    _, came = drawn(config("offload=model"), tmp_path / "two", monkeypatch)
    assert sum("text_encoder" in names for names in came) == 2
