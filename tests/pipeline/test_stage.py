"""The chain of stages: every mistake in the list is named before anything is loaded."""

from __future__ import annotations

import shutil

import pytest

from hydrarun.core.errors import UsageError
from hydrarun.engine.runner import Runner
from hydrarun.pipeline.stage import Stage, check_stages
from hydrarun.pipeline.stages.decode import DecodeLatents
from hydrarun.pipeline.stages.denoise import Denoise
from hydrarun.pipeline.stages.encode import EncodePrompt
from hydrarun.pipeline.stages.latents import PrepareLatents
from hydrarun.pipeline.stages.timesteps import PrepareTimesteps
from hydrarun.pipeline.state import State
from tests.helpers import tiny

CHAIN = [EncodePrompt(["x"]), PrepareLatents(), PrepareTimesteps(), Denoise(["grid"]), DecodeLatents()]


def without(cls: type) -> list[Stage]:
    return [stage for stage in CHAIN if not isinstance(stage, cls)]


def test_the_shipped_order_is_complete():
    check_stages(CHAIN)


def test_a_missing_stage_is_named_by_what_is_missing():
    with pytest.raises(UsageError, match=r"model.stages\[2\] \(Denoise\) needs timesteps.*no stage of this list gives"):
        check_stages(without(PrepareTimesteps))


def test_a_stage_in_the_wrong_place():
    with pytest.raises(UsageError, match=r"PrepareTimesteps\) needs grid.*PrepareLatents gives it, but runs later"):
        check_stages([CHAIN[0], CHAIN[2], CHAIN[1], *CHAIN[3:]])


def test_no_pictures():
    with pytest.raises(UsageError, match="no stage gives frames"):
        check_stages(without(DecodeLatents))


def test_a_field_that_the_state_lacks():
    class Typo(Stage):
        needs = ("latnets",)

    with pytest.raises(UsageError, match=r"no field 'latnets'. Did you mean 'latents'"):
        check_stages([Typo()])


def test_the_state_is_closed():
    state = State(["a"], None, [0], [], 8, 8, None, 1, 1.0, None, None, 8)
    with pytest.raises(AttributeError):
        state.latnets = 1


def test_the_chain_is_checked_before_weights_are_read(tiny_folder, tmp_path):
    """The checkpoint has no weight files."""
    folder = shutil.copytree(tiny_folder, tmp_path / "x", ignore=shutil.ignore_patterns("*.safetensors"))
    config = tiny.config(folder)
    del config["model"]["stages"][3]
    with pytest.raises(UsageError, match="Denoise"):
        Runner(config)
