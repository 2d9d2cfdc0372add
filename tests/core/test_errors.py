import pickle

import numpy as np
import pytest
import torch

from hydrarun.core.errors import (
    UsageError,
    find_closest,
    is_host_memory_error,
    make_host_memory_error,
    raise_mistakes,
    report_error,
    suggest_name,
)


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


def test_each_argument_of_an_error_is_one_printable_line(capsys):
    """What it quotes starts no line of its own."""
    error = UsageError("a\x1b[2J: b\nerror: c", "d\u202e")
    assert str(error) == "a?[2J: b error: c\nd?"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert report_error(error) == 2
    assert capsys.readouterr().err == "a?[2J: b error: c\nd?\n"
    with pytest.raises(UsageError) as caught:
        raise_mistakes(["x: a\nb", "y", "y"])
    assert str(caught.value) == "x: a b\ny"


@pytest.mark.parametrize(
    ("allocate", "size"),
    [
        (lambda: torch.empty(10**14), ", 400000000000000 bytes more were asked for"),
        (lambda: torch.empty(2**62, 4), ""),
        (lambda: np.empty(10**15), ", 7.11 PiB more were asked for"),
        (lambda: bytearray(10**15), ""),
    ],
)
def test_what_no_host_has_memory_for_is_one_line(allocate, size, capsys):
    with pytest.raises((MemoryError, RuntimeError)) as caught:
        allocate()
    assert is_host_memory_error(caught.value)
    said = str(make_host_memory_error(caught.value, "denoise"))
    assert said == f"out of memory in denoise: on the host{size}; `hydrarun plan` shows settings that fit"
    assert report_error(caught.value) == 1
    assert capsys.readouterr().err == said.replace(" in denoise", "") + "\n"


def test_other_errors_are_not_about_memory():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(-1)
    assert not is_host_memory_error(caught.value)
    assert not is_host_memory_error(ValueError("not enough memory"))
