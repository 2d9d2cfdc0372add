"""Every option of the group `scheduler` on every model: it draws, or is refused before weights are read."""

from __future__ import annotations

import pytest

from hydrarun.core.errors import UsageError
from hydrarun.core.resources import read_options
from hydrarun.engine.runner import Runner
from hydrarun.models.weights import loader
from hydrarun.pipeline.schedule_check import check_schedules
from hydrarun.pipeline.schedulers import make_scheduler, predicts_flow, read_scheduler
from tests.helpers.subjects import MODELS

OPTIONS = read_options("scheduler")

#: calls of the model per step, for two steps
FORWARDS = {"heun": 3}


@pytest.mark.sample(60)
@pytest.mark.parametrize(
    ("subject", "option"), [(name, option) for name in MODELS for option in OPTIONS], indirect=["subject"]
)
def test_it_draws_or_is_refused(subject, option, monkeypatch):
    config, saved = {**subject.runner.config, "scheduler": OPTIONS[option]}, read_scheduler(subject.folder)
    own, theirs = (str(name).rpartition(".")[2] for name in (saved["_class_name"], OPTIONS[option].get("_target_", "")))
    if theirs and predicts_flow(saved, own) != predicts_flow(OPTIONS[option], theirs):
        with pytest.raises(UsageError, match="takes another kind of prediction|these settings together"):
            make_scheduler(config, saved)
        return
    pipeline = subject.runner.built.parts.pipeline
    scheduler = make_scheduler(config, saved)
    config = {**config, "sampling": {**config["sampling"], "num_inference_steps": 2}}
    try:
        check_schedules(config, subject.runner.built.stages, scheduler, saved, subject.folder)
    except UsageError as error:
        assert "has no such schedule" in str(error)  # noqa: PT017 - few pairs raise it
        return
    monkeypatch.setattr(pipeline, "scheduler", scheduler or pipeline.scheduler)
    state = subject.draw(num_inference_steps=2)
    assert len(state.timesteps) == FORWARDS.get(option, 2)
    assert state.latents.isfinite().all()
    assert state.latents.abs().max() < 100  # a schedule of another kind of noise levels gives thousands


def test_a_refusal_comes_before_weights(tiny_folder, tiny_runner, monkeypatch):
    monkeypatch.setattr(loader, "load_transformer", lambda *_, **__: pytest.fail("weights are read"))
    config = tiny_runner.config
    with pytest.raises(UsageError, match=r"sampling\.num_inference_steps=1: too few .* use 2 or more"):
        Runner({**config, "sampling": {**config["sampling"], "num_inference_steps": 1}})
    with pytest.raises(UsageError, match="takes another kind of prediction"):
        Runner({**config, "scheduler": OPTIONS["cosine_dpm_solver"]})
    with pytest.raises(UsageError, match="FlowMatchLCMScheduler cannot step with these settings: .* same length"):
        Runner({**config, "scheduler": {**OPTIONS["lcm"], "scale_factors": [1, 2]}})
    with pytest.raises(UsageError, match="SASolverScheduler cannot step with these settings: AssertionError"):
        Runner({**config, "scheduler": {**OPTIONS["sa_solver"], "predictor_order": 0}})
