import pytest
from omegaconf import OmegaConf

from hydrarun.config.compose import compose_config, compose_unchecked
from hydrarun.core.errors import UsageError
from hydrarun.core.quoting import quote_overrides


def test_the_result_is_plain_data():
    config = compose_config([])
    assert OmegaConf.to_container(OmegaConf.create(config)) == config
    assert {type(value) for value in config.values()} == {dict, type(None), str, bool, int}
    assert "hydra" not in config


def test_the_models_defaults_flow_into_sampling_and_the_command_line_wins():
    assert compose_config([])["sampling"]["num_inference_steps"] == 24
    assert compose_config(["sampling.num_inference_steps=3"])["sampling"]["num_inference_steps"] == 3
    qwen = compose_config(["model=qwen_image", "sampling.prompt=a cat, sitting"])["sampling"]
    assert (qwen["height"], qwen["true_cfg_scale"], qwen["prompt"]) == (1328, 4.0, "a cat, sitting")


def test_all_violations_of_a_configuration_come_at_once():
    with pytest.raises(UsageError) as caught:
        compose_config(["model=qwen_image", "sampling.seed=-1", "sampling.height=0", "device=tpu"])
    keys = [line.split(" ")[0] for line in str(caught.value).splitlines()]
    assert keys == ["sampling.prompt"]  # missing values are reported first, wrong values only when none is missing
    with pytest.raises(UsageError) as caught:
        compose_config(["sampling.seed=-1", "sampling.height=0", "device=tpu"])
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize(
    ("overrides", "key", "place"),
    [
        (["sampling.height=0"], "sampling.height", "command line"),
        (["recipe=demo/quick"], "sampling.num_inference_steps", "recipe demo/quick"),
        (["recipe=demo/quick", "sampling.num_inference_steps=3"], "sampling.num_inference_steps", "command line"),
        (["recipe=demo/quick"], "sampling.height", "model demo"),
        (["model.scheduler={_target_: x}"], "model.scheduler._target_", "command line"),
        ([], "device", "default"),
        ([], "model.path", "model demo"),
    ],
)
def test_origin_tells_who_set_a_value(overrides, key, place):
    _, origin = compose_unchecked(quote_overrides(overrides))
    assert origin(key) == place


def test_composing_twice_and_inside_each_other_is_fine():
    assert compose_config(["sampling.seed=1"]) == compose_config(["sampling.seed=1"])


def test_numbers_need_not_be_floats():
    assert compose_config(["sampling.true_cfg_scale=2"])["sampling"]["true_cfg_scale"] == 2.0


@pytest.mark.parametrize(
    ("overrides", "notes"),
    [
        (["sampling.true_cfg_scale=1"], []),  # the negative prompt is the model's default, not set by the user
        (["sampling.negative_prompt=blurry"], []),
        (
            ["sampling.negative_prompt=blurry", "sampling.true_cfg_scale=1"],
            ["sampling.negative_prompt (command line) is not used: sampling.true_cfg_scale=1.0 turns guidance off"],
        ),
    ],
)
def test_what_the_user_sets_to_no_effect_is_said(overrides, notes):
    config, origin = compose_unchecked(quote_overrides(overrides))
    assert origin.notes(config) == notes
