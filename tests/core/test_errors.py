import pytest

from hydrarun.core.errors import find_closest, suggest_name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dmeo", "demo"),
        ("steps", "num_inference_steps"),
        ("stpes", "num_inference_steps"),
        ("cfg_scale", "true_cfg_scale"),
        ("prompt", "prompt"),  # not negative_prompt, which has that word
        ("zzz", None),
    ],
)
def test_closest_looks_at_whole_names_and_at_their_words(name, expected):
    assert (
        find_closest(name, ["demo", "num_inference_steps", "true_cfg_scale", "negative_prompt", "prompt"]) == expected
    )


def test_nearest_is_a_sentence_or_nothing():
    assert suggest_name("dmeo", ["demo"]) == " Did you mean 'demo'?"
    assert suggest_name("zzz", ["demo"]) == ""
    assert suggest_name("zzz", []) == ""
