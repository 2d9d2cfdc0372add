"""The group `scheduler`: each option against diffusers with the same scheduler, and invalid settings."""

from __future__ import annotations

import inspect
import sys

import diffusers
import pytest

from hydrarun.config.compose import compose_config
from hydrarun.core.errors import UsageError
from hydrarun.core.resources import read_options
from hydrarun.engine.runner import Runner
from hydrarun.pipeline.schedulers import make_scheduler
from tests.helpers import tiny

SAVED = {"_class_name": "FlowMatchEulerDiscreteScheduler", "_diffusers_version": "0.41", "shift": 3.0, **tiny.SCHEDULER}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
#: for each option, the settings of the reference that differ from the checkpoint's
REFERENCES = {
    "euler": {},
    "heun": {},
    "lcm": {},
    "unipc": FLOW,
    "dpm_solver": FLOW,
    "deis": FLOW,
    "sa_solver": FLOW,
}


def made(*overrides: str, saved: dict = SAVED):
    return make_scheduler(compose_config([*overrides]), saved)


def test_every_option_is_tried_here():
    assert {*read_options("scheduler")} == {*REFERENCES, "checkpoint", "cosine_dpm_solver"}


def test_the_checkpoints_own_is_left_alone():
    assert compose_config([])["scheduler"] == {}
    assert made() is None


def reference_scheduler(name: str, saved: dict):
    cls = getattr(diffusers, read_options("scheduler")[name]["_target_"].partition(".")[2])
    return cls.from_config({**saved, **REFERENCES[name]})


def check_settings(ours, theirs) -> None:
    takes = inspect.signature(type(theirs)).parameters
    assert type(ours) is type(theirs)
    assert {key: ours.config[key] for key in takes} == {key: theirs.config[key] for key in takes}


@pytest.mark.parametrize("name", ["euler", "unipc"])
def test_noise_levels_shifted_by_size_are_diffusers(name, tiny_folder, tiny_pipeline):
    """Only schedulers that take the noise levels of the reference pipeline. Latents within 1e-4."""
    scheduler = reference_scheduler(name, dict(tiny_pipeline.scheduler.config))
    runner = tiny.runner(tiny_folder, f"scheduler={name}")
    check_settings(runner.built.parts.pipeline.scheduler, scheduler)
    state = tiny.draw(runner, num_inference_steps=5)
    reference = diffusers.QwenImagePipeline(**{**tiny_pipeline.components, "scheduler": scheduler})
    reference.set_progress_bar_config(disable=True)
    assert (tiny.reference(reference, state, "latent") - state.latents).abs().max() <= 1e-4


@pytest.mark.parametrize("subject", ["wan21_t2v_14b"], indirect=True)
@pytest.mark.parametrize("name", ["euler", "unipc", "dpm_solver", "deis"])
def test_a_schedulers_own_noise_levels_are_diffusers(name, subject):
    """Latents within 1e-4 of the reference pipeline with the scheduler that `from_config` makes."""
    saved = {**dict(subject.pipeline.scheduler.config)}
    saved["shift"] = saved["flow_shift"]
    solver = {"dpm_solver": "midpoint", "deis": "logrho"}.get(name, "bh2")
    scheduler = reference_scheduler(name, {**saved, "solver_type": solver})
    runner = Runner(compose_config([*subject.overrides(), f"scheduler={name}"]))
    check_settings(runner.built.parts.pipeline.scheduler, scheduler)
    state = tiny.draw(runner)
    pipeline = diffusers.WanPipeline(**{**subject.pipeline.components, "scheduler": scheduler})
    pipeline.set_progress_bar_config(disable=True)
    assert (tiny.reference(pipeline, state, "latent") - state.latents).abs().max() <= 1e-4


@pytest.mark.parametrize("name", ["heun", "lcm", "sa_solver"])
def test_others_draw(name, tiny_folder, tiny_pipeline):
    """Not compared: the reference pipeline refuses Heun and SA-Solver; LCM's noise is drawn per item here."""
    runner = tiny.runner(tiny_folder, f"scheduler={name}")
    check_settings(
        runner.built.parts.pipeline.scheduler, reference_scheduler(name, dict(tiny_pipeline.scheduler.config))
    )
    both, alone = (tiny.draw(runner, num_inference_steps=4, seed=seed).latents for seed in ([3, 4], [4]))
    assert both.isfinite().all()
    assert (both[1:] - alone).abs().max() <= 1e-4  # a batch equals its items drawn alone
    assert (both[1:] - tiny.draw(tiny.runner(tiny_folder), num_inference_steps=4, seed=[4]).latents).abs().max() > 1e-2


@pytest.mark.parametrize("subject", ["wan21_t2v_14b"], indirect=True)
def test_the_shift_has_two_names(subject):
    """`flow_shift` and `shift` are one setting; each class gets it under its own name."""
    runner = Runner(compose_config([*subject.overrides(), "scheduler=euler"]))
    own = subject.pipeline.scheduler.config.flow_shift
    assert runner.built.parts.pipeline.scheduler.config.shift == own
    assert made("scheduler=unipc", "scheduler.shift=4").config.flow_shift == 4.0
    assert made("scheduler=unipc").config.flow_shift == SAVED["shift"]
    assert made("scheduler=heun").config.shift == SAVED["shift"]


@pytest.mark.parametrize("option", ["checkpoint", "euler", "unipc", "dpm_solver", "deis", "heun", "sa_solver", "lcm"])
def test_a_shift_is_never_without_effect(option, tiny_runner):
    """The checkpoint shifts by size; a given shift replaces that: sigma' = s sigma / (1 + (s - 1) sigma)."""

    def levels(shift: int):
        saved = {**SAVED, "shift_terminal": None}
        scheduler = made(f"scheduler={option}", f"scheduler.shift={shift}", saved=saved)
        scheduler.set_timesteps(num_inference_steps=4)
        return scheduler.sigmas[: len(scheduler.sigmas) - 1]

    plain, shifted = levels(1), levels(3)
    inside = (plain > 1e-3) & (plain < 0.999)
    assert inside.any()
    want = 3 * plain / (1 + 2 * plain)
    assert (shifted - want)[inside].abs().max() <= 2e-3  # the schedulers cut the ends at different places


def test_single_values_of_the_checkpoints_own():
    scheduler = made("scheduler.base_shift=1.0986", "scheduler.max_shift=1.0986", "scheduler.shift_terminal=null")
    assert type(scheduler).__name__ == SAVED["_class_name"]
    want = {**SAVED, "base_shift": 1.0986, "max_shift": 1.0986, "shift_terminal": None}
    assert {key: scheduler.config[key] for key in want if not key.startswith("_")} == {
        key: value for key, value in want.items() if not key.startswith("_")
    }


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["scheduler.shfit=3"], "scheduler.shfit: FlowMatchEulerDiscreteScheduler takes no such argument."),
        (["scheduler=heun", "scheduler.use_karras_sigmas=true"], "scheduler.use_karras_sigmas: FlowMatchHeun"),
        (["scheduler.shift=big"], "scheduler.shift: 'big' is not a finite number above 0"),
        (["scheduler.shift=null"], "scheduler.shift: null is not a finite number above 0"),
        (["scheduler.shift=0"], "scheduler.shift: 0 is not a finite number above 0"),
        (["scheduler.shift=inf"], "scheduler.shift: inf is not a finite number above 0"),
        (["scheduler.base_shift=big"], "scheduler.base_shift: 'big' is not a number"),
        (["scheduler=unipc", "scheduler.shift=2", "scheduler.flow_shift=3"], "are one setting under two names"),
        (["scheduler.shift=2", "scheduler.use_dynamic_shifting=true"], "scheduler.shift: has no effect where noise"),
        (
            ["scheduler=unipc", "scheduler.use_flow_sigmas=false"],
            "UniPCMultistepScheduler does not take these settings",
        ),
        (["scheduler._target_=hydrarun.pipeline.guidance.ClassifierFreeGuidance"], "is no scheduler of diffusers'"),
        (["scheduler=cosine_dpm_solver"], "CosineDPMSolverMultistepScheduler takes another kind of prediction than"),
        (["scheduler=unipc", "scheduler.prediction_type=epsilon"], "UniPCMultistepScheduler takes another kind"),
        (["scheduler=dpm_solver", "scheduler.use_flow_sigmas=false"], "DPMSolverMultistepScheduler takes another kind"),
        (["model.scheduler.shift=3"], "a section of older versions' files; use scheduler.shift=…"),
    ],
)
def test_what_cannot_be_is_refused(overrides, said):
    with pytest.raises(UsageError) as caught:
        made(*overrides)
    assert said in str(caught.value)


def test_a_model_without_a_flow_has_no_flow_scheduler():
    saved = {"_class_name": "CosineDPMSolverMultistepScheduler", "prediction_type": "v_prediction"}
    assert type(made("scheduler=cosine_dpm_solver", saved=saved)).__name__ == saved["_class_name"]
    with pytest.raises(UsageError, match="EulerDiscreteScheduler takes another kind of prediction"):
        made("scheduler=euler", saved=saved)


def test_what_version_0_1_0_wrote_is_made_as_it_was():
    """`model.scheduler` ignores the checkpoint's settings; an option of the group takes precedence."""
    older = "model.scheduler={_target_: diffusers.FlowMatchEulerDiscreteScheduler, max_shift: 2.0}"
    assert made(older).config.shift == 1.0
    assert made(older).config.max_shift == 2.0
    assert type(made(older, "scheduler=heun")).__name__ == "FlowMatchHeunDiscreteScheduler"


def test_what_an_extra_brings_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchsde", None)
    saved = {"_class_name": "CosineDPMSolverMultistepScheduler", "prediction_type": "v_prediction"}
    with pytest.raises(UsageError, match=r"needs torchsde, .*: pip install 'hydrarun\[audio\]'"):
        made(saved=saved)
