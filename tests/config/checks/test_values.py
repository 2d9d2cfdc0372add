import copy

import pytest

from hydrarun.config.checks.values import check_values, find_problems
from hydrarun.core.errors import UsageError

TARGET = {"_target_": "hydrarun.models.layers.attention_backends.SDPA"}
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
        "experts": 1,
        "stages": [TARGET],
        "takes": ["negative_prompt", "true_cfg_scale", "max_sequence_length"],
        "limits": {"max_sequence_length": 1024},
        "input_images": [0, 0],
        "teacache": None,
        "judge": None,
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
        "layers": None,
        "resolution": None,
        "seed": 0,
        "num_images_per_prompt": None,
        "max_sequence_length": 512,
        "audio_start_in_s": None,
        "audio_end_in_s": None,
    },
    "input": {"images": None, "prompts": None},
    "parallel": {
        **dict.fromkeys((f"{name}_degree" for name in ("data", "cfg", "ring", "ulysses", "tensor", "hsdp", "vae")), 1),
        "max_ranks": None,
    },
    "scheduler": {},
    "cache": TARGET,
    "attention": TARGET,
    "compile": TARGET,
    "quantization": TARGET,
    "offload": TARGET,
    "plan": {"auto": False, "device": None},
    "vae": {"dtype": None, "slicing": False, "tiling": False, "channels_last": False},
    "output": {"format": "png", "fps": None, "metadata": True},
    "report": {"metrics": [], "noise_floor": [], "objectives": [], "twins": "outputs/twins"},
    "batch_size": None,
    "retry": 0,
    "fail_fast": False,
    "warmup": 0,
    "device": "auto",
    "dtype": "auto",
    "verify": False,
    "strict_prompt": False,
}


FIT = {
    "model": "m",
    "coefficients": {"transformer": [1.0, 0.0]},
    "revision": None,
    "weights": None,
    "scheduler": None,
    "num_inference_steps": None,
    "source": None,
}


def changed(**values):
    """Return a copy of GOOD with dotted keys (written with __) set."""
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
        {"model__teacache": FIT},
        {"cache__gate": {"fit": FIT}},
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
        {"sampling__num_images_per_prompt": 1024},
        {"sampling__num_images_per_prompt": 100_000, "batch_size": 4},
        {"device": "cuda:127"},
        {"scheduler": {"num_train_timesteps": 1000, "beta_schedule": "linear"}},
    ],
)
def test_good_values(values):
    check_values(changed(**values))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model__teacache", 3, "is not a mapping"),
        ("model__teacache", {**FIT, "model": None}, "null is not text"),
        ("model__teacache", {**FIT, "coefficents": {}}, "unknown key. Did you mean 'coefficients'?"),
        ("model__teacache", {**FIT, "coefficients": {"transformer": 3}}, "is not a mapping of a list of a number"),
        ("model__teacache", {**FIT, "coefficients": {"transformer_2": [1.0]}}, "has none for transformer."),
        ("model__teacache", {**FIT, "num_inference_steps": [9, 3]}, "[9, 3] is not [least, most]."),
        ("cache__gate", {"fit": {**FIT, "num_inference_steps": [3]}}, "[3] is not [least, most]."),
        ("warmup", -1, "-1 is below 0."),
        ("warmup", 5, "5 is above sampling.num_inference_steps=4"),
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
        (
            "sampling__guidance_scale",
            3.5,
            "model m does not take it; its optional fields: negative_prompt, true_cfg_scale",
        ),
        ("sampling__guidance_scale_2", 0.0, "does not take it"),
        ("sampling__num_frames", 81, "does not take it"),
        ("sampling__height", None, "null, and model m has no input image to take it from"),
        ("sampling__true_cfg_scale", None, "null; 1 turns guidance off"),
        ("sampling__max_sequence_length", None, "null, and model m needs it"),
        ("model__takes", ["num_frame"], "Did you mean 'num_frames'?"),
        ("model__limits", {"guidance": 3}, "Did you mean 'guidance_scale'?"),
        ("model__input_images", [2, 1], "is not [least, most]"),
        ("model__limits", {"max_sequence_length": "x"}, "'x' is not a whole number or a list of them"),
        ("model__limits", {"max_sequence_length": []}, "[] is not a whole number or a list of them"),
        ("model__patch_size", 0, "0 is below 1"),
        ("input__images", "a.png", "lists 1 image; model m takes none: input.images=null"),
        ("input__images", [1], "is not a file or a list of files"),
        ("output__format", "mp4", "model m draws pictures: png"),
        ("output__fps", 16, "model m draws pictures, which have none"),
        ("vae__dtype", "fp32", "none of null, float32"),
        ("sampling__num_inference_steps", 0, "0 is below 1"),
        ("sampling__num_inference_steps", True, "true is not a whole number"),
        ("sampling__num_inference_steps", 2.5, "2.5 is not a whole number"),
        ("sampling__height", -8, "-8 is below 1"),
        ("sampling__width", 0, "0 is below 1"),
        ("sampling__height", "???", "is missing: set it, sampling.height=…"),
        ("sampling__max_sequence_length", 1025, "1025 is above 1024, the most that model m takes"),
        ("sampling__max_sequence_length", 0, "0 is below 1"),
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
        ("sampling__num_images_per_prompt", 2_000_000_000, "asks for 2000000000 pictures in one run; 100000 at most"),
        ("sampling__num_images_per_prompt", 1025, "asks for 1025 pictures in one batch; 1024 at most: set batch_size"),
        ("sampling__num_images_per_prompt", -(10**12), "-1000000000000 is below 1"),
        ("sampling__prompt", ["a"] * 100_001, "asks for 100001 pictures in one run; 100000 at most"),
        ("sampling__seed", [1] * 100_001, "asks for 100001 pictures in one run; 100000 at most"),
        ("sampling__seed", 10**400, "a whole number of 1329 bits; 64 at most"),
        ("sampling__true_cfg_scale", 10**400, "a whole number of 1329 bits; 64 at most"),
        ("sampling__num_inference_steps", 10**12, "1000000000000 is above 100000"),
        ("sampling__height", 1_000_000_000, "1000000000 is above 16384"),
        ("sampling__width", 2**63, "9223372036854775808 is above 16384"),
        ("batch_size", 10**12, "1000000000000 is above 1024"),
        ("model__patch_size", 10**9, "1000000000 is above 256"),
        ("model__experts", 0, "0 is below 1"),
        ("model__experts", 3, "3 is above 2"),
        ("scheduler", {"num_train_timesteps": 0}, "0 is below 1"),
        ("scheduler", {"num_train_timesteps": 10**12}, "1000000000000 is above 1000000"),
        ("device", "cuda:128", "is none of auto, cpu, cuda, cuda:0, cuda:1… cuda:127"),
        ("device", "cuda:999999999999", "is none of auto"),
        ("device", "cuda:01", "is none of auto"),
        ("device", "cuda:\u0663", "is none of auto"),
        ("model__stages", ["x"], "is not a list of a mapping"),
        ("vae__slicing", "no", "'no' is not true or false"),
    ],
)
def test_one_bad_value_is_one_line_that_names_it(key, value, message):
    found = list(find_problems(changed(**{key: value})))
    assert len(found) == 1, found
    assert message in found[0][1]
    assert found[0][0].startswith(key.replace("__", ".").split(".")[0])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sampling__seed": [1, 2, 3], "sampling__num_images_per_prompt": 2}, "3 seeds for 1 prompts x 2 pictures"),
        ({"sampling__prompt": ["a", "b"], "sampling__seed": [1, 2, 3]}, "3 seeds for 2 prompts"),
        (
            {"sampling__seed": 2**63 - 1, "sampling__num_images_per_prompt": 2},
            "sampling.seed: 9223372036854775807 is above 9223372036854775806: the last of 2 pictures gets seed",
        ),
        (
            {"sampling__true_cfg_scale": 1e300, "sampling__negative_prompt": " "},
            r"^sampling.true_cfg_scale: 1e\+300 is above 1000.$",
        ),
        (
            {"sampling__prompt": ["a"] * 400, "sampling__num_images_per_prompt": 400},
            "sampling.num_images_per_prompt: asks for 160000 pictures",
        ),
    ],
)
def test_fields_must_fit_together(values, message):
    with pytest.raises(UsageError, match=message):
        check_values(changed(**values))


def test_a_missing_section_is_named():
    config = changed()
    del config["vae"]
    assert list(find_problems(config)) == [("vae", "is missing.")]


def test_all_violations_come_at_once_with_their_origin():
    config = changed(device="tpu", sampling__height=0, sampling__seed=-1)
    with pytest.raises(UsageError) as caught:
        check_values(config, lambda key: f"from {key}")
    lines = str(caught.value).splitlines()
    assert [line.split(" ")[0] for line in lines] == ["device", "sampling.height", "sampling.seed"]
    assert lines[1] == "sampling.height (from sampling.height): 0 is below 1."


VIDEO = {
    "model__takes": ["negative_prompt", "guidance_scale", "num_frames"],
    "model__limits": {},
    "model__guidance": {**TARGET, "scale": "guidance_scale"},
    "model__input_images": [1, 2],
    "input__images": "a.png",
    "sampling__true_cfg_scale": None,
    "sampling__guidance_scale": 1.0,
    "sampling__max_sequence_length": None,
    "sampling__num_frames": 5,
    "output__format": "mp4",
    "output__fps": 16,
}


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"output__format": "frames"},
        {"input__images": ["a.png", "b.png"]},
        {"sampling__height": None, "sampling__width": None},
        {"sampling__guidance_scale": 0.0},
    ],
)
def test_good_values_of_a_video_model(values):
    check_values(changed(**{**VIDEO, **values}))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("output__format", "png", "model m draws videos: mp4 or frames"),
        ("output__fps", None, "a video needs frames per second, output.fps=16"),
        ("output__fps", 0, "0 is below 1"),
        ("output__fps", 10**9, "1000000000 is above 1000"),
        ("sampling__num_frames", 10**12, "1000000000000 is above 10000"),
        ("sampling__guidance_scale", float("nan"), "not a finite number"),
        ("sampling__num_frames", None, "null, and model m needs it"),
        ("sampling__num_frames", 0, "0 is below 1"),
        ("sampling__guidance_scale", -0.1, "not a finite number"),
        ("sampling__guidance_scale", float("inf"), "not a finite number"),
        ("sampling__guidance_scale", None, "null; 1 turns guidance off"),
        ("sampling__guidance_scale", 5.0, "guidance_scale=5.0 guides away from it"),
        ("sampling__true_cfg_scale", 4.0, "does not take it; its optional fields: negative_prompt, guidance_scale"),
        ("input__images", None, "model m needs 1: input.images=picture.png"),
        ("input__images", ["a", "b", "c"], "lists 3 images; model m takes 1 to 2"),
    ],
)
def test_a_bad_value_of_a_video_model_is_one_line(key, value, message):
    with pytest.raises(UsageError) as caught:
        check_values(changed(**{**VIDEO, key: value}))
    text = str(caught.value)
    assert message in text
    assert "\n" not in text
