"""Precedence of values: conf/config.yaml < the model's own values < options and values of the user."""

from __future__ import annotations

from dataclasses import fields

import pytest

from hydrarun.config.compose import compose_unchecked
from hydrarun.config.schema import Config
from hydrarun.core.resources import list_groups

#: for each section that is not a group of options: a value that differs from the default
OWN = {
    "sampling": ("max_sequence_length", 77),
    "input": ("images", "a.png"),
    "vae": ("slicing", True),
    "output": ("metadata", False),
    "report": ("metrics", ["psnr"]),
    "batch_size": (None, 3),
    "retry": (None, 2),
    "fail_fast": (None, True),
    "warmup": (None, 1),
    "device": (None, "cpu"),
    "dtype": (None, "bfloat16"),
    "verify": (None, True),
    "strict_prompt": (None, True),
}
#: for each group except `model`: an option that differs from the default
CHOSEN = {
    "scheduler": "heun",
    "parallel": "ulysses2",
    "cache": "every_n",
    "attention": "flex",
    "compile": "blocks",
    "quantization": "int8",
    "offload": "disk",
    "plan": "auto",
}


def test_every_section_is_tried_here():
    sections = {field.name for field in fields(Config)}
    assert sections == {"model", *OWN, *CHOSEN}
    assert {*CHOSEN, "model", "sampling"} == {group for group in list_groups() if "/" not in group}


def model(tmp_path, text: str) -> str:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "mine.yaml").write_text(f"# @package _global_\n# mine\n{text}")
    return f"hydra.searchpath=[file://{tmp_path}]"


@pytest.mark.sample(4)
@pytest.mark.parametrize("section", OWN)
def test_a_models_own_value_wins_over_the_default(section, tmp_path):
    key, value = OWN[section]
    text = f"{section}: {value}\n" if key is None else f"{section}: {{{key}: {value}}}\n"
    where = model(tmp_path, f"defaults: [demo, _self_]\n{text}")
    composed = compose_unchecked([where, "model=mine"])[0][section]
    assert (composed if key is None else composed[key]) == value
    usual = compose_unchecked(["model=demo"])[0][section]
    assert (usual if key is None else usual[key]) != value


@pytest.mark.sample(3)
@pytest.mark.parametrize("group", CHOSEN)
def test_a_model_chooses_options_and_the_user_others(group, tmp_path):
    where = model(tmp_path, f"defaults: [demo, override /{group}: {CHOSEN[group]}, _self_]\n")
    chosen, usual = (compose_unchecked([where, *words])[0][group] for words in (["model=mine"], ["model=demo"]))
    assert chosen == compose_unchecked([f"{group}={CHOSEN[group]}"])[0][group] != usual
    default = {"scheduler": "checkpoint", "attention": "sdpa"}.get(group, "none")
    assert compose_unchecked([where, "model=mine", f"{group}={default}"])[0][group] == usual


def test_the_second_expert_follows_the_first_ones_scale():
    sampling = compose_unchecked(["model=wan22_i2v_a14b", "sampling.guidance_scale=5"])[0]["sampling"]
    assert (sampling["guidance_scale"], sampling["guidance_scale_2"]) == (5.0, None)
