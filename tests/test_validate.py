import copy

import pytest

from hydrarun.errors import UsageError
from hydrarun.validate import check_values, problems

TARGET = {"_target_": "hydrarun.layers.backends.SDPA"}
GOOD = {
    "model": {
        "name": "m",
        "task": "text-to-image",
        "path": "p",
        "revision": None,
        "pipeline": TARGET,
        "transformer": TARGET,
        "scheduler": None,
        "guidance": TARGET,
        "patch_size": 2,
        "stages": [TARGET],
        "takes": ["negative_prompt", "true_cfg_scale", "max_sequence_length"],
        "limits": {"max_sequence_length": 1024},
        "input_images": [0, 0],
        "facts": {},
    },
    "sampling": {
        "prompt": "a cat",
        "negative_prompt": None,
        "num_inference_steps": 4,
        "true_cfg_scale": 1.0,
        "guidance_scale": None,
        "guidance_scale_2": None,
        "height": 64,
        "width": 64,
        "num_frames": None,
        "seed": 0,
        "num_images_per_prompt": None,
        "max_sequence_length": 512,
    },
    "input": {"images": None},
    "attention": TARGET,
    "compile": TARGET,
    "offload": TARGET,
    "vae": {"dtype": None, "slicing": False, "tiling": False},
    "output": {"format": "png", "fps": None, "metadata": True},
    "device": "auto",
    "dtype": "auto",
}


def changed(**values):
    """GOOD with dotted keys (written with __) set."""
    config = copy.deepcopy(GOOD)
    for key, value in values.items():
        *path, last = key.split("__")
        node = config
        for part in path:
            node = node[part]
        node[last] = value
    return config


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"device": "cuda:3"},
        {"dtype": "bfloat16"},
        {"sampling__true_cfg_scale": 0},
        {"sampling__true_cfg_scale": 4.0, "sampling__negative_prompt": " "},
        {"sampling__seed": 2**63 - 1},
        {"sampling__seed": [1, 2, 3]},
        {"sampling__seed": [1, 2], "sampling__num_images_per_prompt": 2},
        {"sampling__prompt": ["a", "b"], "sampling__seed": [1, 2, 3, 4]},
        {"sampling__prompt": ["a", "b"], "sampling__negative_prompt": ["c", "d"]},
        {"sampling__prompt": ["a", "b"], "sampling__negative_prompt": "c"},
        {"sampling__max_sequence_length": 1024},
    ],
)
def test_good_values(values):
    check_values(changed(**values))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("device", "tpu", "none of auto, cpu, cuda"),
        ("device", "cuda:", "none of auto"),
        ("device", "cuda:x", "none of auto"),
        ("dtype", "bf16", "Did you mean 'bfloat16'?"),
        ("sampling__prompt", "", "not a non-empty text"),
        ("sampling__prompt", [], "not a non-empty text"),
        ("sampling__prompt", ["a", ""], "not a non-empty text"),
        ("sampling__prompt", 3, "not a non-empty text"),
        ("sampling__prompt", None, "null is not a non-empty text"),
        ("sampling__prompt", "???", 'is missing: set it, sampling.prompt="…"'),
        ("sampling__prompt", ["a", "???"], "is missing"),
        ("sampling__negative_prompt", 3, "not null, a text or a list of texts"),
        ("sampling__negative_prompt", ["a", "b"], "lists 2 texts for 1 prompts"),
        ("sampling__true_cfg_scale", 4.0, 'set sampling.negative_prompt=" "'),
        ("sampling__true_cfg_scale", -1, "not a finite number >= 0"),
        ("sampling__true_cfg_scale", float("nan"), "not a finite number"),
        ("sampling__true_cfg_scale", True, "true is not a number"),
        ("sampling__guidance_scale", -0.1, "not a finite number"),
        ("sampling__guidance_scale", float("inf"), "not a finite number"),
        ("sampling__num_inference_steps", 0, "0 is below 1"),
        ("sampling__num_inference_steps", True, "true is not a whole number"),
        ("sampling__num_inference_steps", 2.5, "2.5 is not a whole number"),
        ("sampling__height", -8, "-8 is below 1"),
        ("sampling__width", 0, "0 is below 1"),
        ("sampling__height", "???", "is missing: set it, sampling.height=…"),
        ("sampling__max_sequence_length", 1025, "not between 1 and 1024"),
        ("sampling__max_sequence_length", 0, "not between 1 and 1024"),
        ("sampling__num_images_per_prompt", 0, "0 is below 1"),
        ("sampling__seed", -1, "not a whole number from 0 to 2**63-1"),
        ("sampling__seed", 2**63, "not a whole number from 0"),
        ("sampling__seed", True, "not a whole number from 0"),
        ("sampling__seed", 1.5, "not a whole number from 0"),
        ("sampling__seed", [], "not a whole number from 0"),
        ("sampling__seed", [1, "2"], "not a whole number from 0"),
        ("sampling__stpes", 3, "unknown key. Did you mean 'num_inference_steps'?"),
        ("extra", 3, "unknown key"),
        ("vae", 3, "is not a mapping"),
        ("model__stages", ["x"], "is not a list of a mapping"),
        ("vae__slicing", "no", "'no' is not true or false"),
    ],
)
def test_one_bad_value_is_one_line_that_names_it(key, value, message):
    found = list(problems(changed(**{key: value})))
    assert len(found) == 1, found
    assert message in found[0][1]
    assert found[0][0].startswith(key.replace("__", ".").split(".")[0])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sampling__seed": [1, 2, 3], "sampling__num_images_per_prompt": 2}, "3 seeds for 1 prompts x 2 pictures"),
        ({"sampling__prompt": ["a", "b"], "sampling__seed": [1, 2, 3]}, "3 seeds for 2 prompts"),
    ],
)
def test_fields_must_fit_together(values, message):
    with pytest.raises(UsageError, match=message):
        check_values(changed(**values))


def test_a_missing_section_is_named():
    config = changed()
    del config["vae"]
    assert list(problems(config)) == [("vae", "is missing.")]


def test_all_violations_come_at_once_with_their_origin():
    config = changed(device="tpu", sampling__height=0, sampling__seed=-1)
    with pytest.raises(UsageError) as caught:
        check_values(config, lambda key: f"from {key}")
    lines = str(caught.value).splitlines()
    assert [line.split(" ")[0] for line in lines] == ["device", "sampling.height", "sampling.seed"]
    assert lines[1] == "sampling.height (from sampling.height): 0 is below 1."
