"""What text encoders do not read of a prompt is said, recorded, and refused with `strict_prompt`."""

from __future__ import annotations

import json
import re
import warnings

import pytest
import torch

import hydrarun
from hydrarun.cli import main
from hydrarun.core.errors import UsageError
from hydrarun.engine.runner import make_pictures
from hydrarun.outputs.media import png
from hydrarun.pipeline.truncation import ReadPrompt, describe_cut, refuse_lost_words
from tests.helpers import tiny
from tests.helpers.subjects import CONFIGS, FAMILIES

LIMIT = 300

#: models whose encoders read a prompt of any length; those of GLM-Image cut only what a prompt quotes
UNLIMITED = {"glm_image", *(name for name in FAMILIES if "edit" in name)}

WORDS = "a red cat and a blue dog sit on a green bench under a tall old tree " * 12


def limits(name: str) -> dict[str, int]:
    """Return the field that limits the tokens of a prompt, for models that take it."""
    return {"max_sequence_length": LIMIT} if "max_sequence_length" in CONFIGS[name]["model"]["takes"] else {}


@pytest.mark.sample(8)
@pytest.mark.parametrize("subject", [name for name in FAMILIES if name not in UNLIMITED], indirect=True)
def test_what_is_said_not_to_be_read_changes_nothing(subject):
    """Words behind the cut may be any others: the latents stay the same to the bit. One before it changes them."""
    fields = {"num_inference_steps": 2, **limits(subject.name)}
    state = subject.draw(prompt=WORDS, **fields)
    cuts = make_pictures(state)[0].cuts
    assert cuts
    cut = min((one["cut"] for one in cuts if one["text"] == "prompt"), key=len)  # what no encoder reads
    assert WORDS.strip().endswith(cut)
    start = WORDS.strip().rindex(cut)
    other = subject.draw(prompt=WORDS.strip()[:start] + "z" * len(cut), **fields)
    assert torch.equal(other.latents, state.latents)
    assert start > 0
    seen = subject.draw(prompt="z" + WORDS[1:], **fields)
    assert not torch.equal(seen.latents, state.latents)


@pytest.mark.parametrize("subject", ["qwen_image_edit_plus"], indirect=True)
def test_an_encoder_without_a_limit_reads_all(subject):
    assert make_pictures(subject.draw(prompt=WORDS))[0].cuts == []


def test_a_prompt_that_is_read_is_not_mentioned(tiny_runner):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (picture,) = tiny_runner.generate(prompt="a cat", num_inference_steps=2)
    assert picture.cuts == []


def test_the_command_says_and_records_it(tiny_folder, tmp_path, capsys):
    words = [*tiny.overrides(tiny_folder), f"sampling.prompt={WORDS}", f"sampling.max_sequence_length={LIMIT}"]
    assert main.main([*words, "warmup=1", f"hydra.run.dir={tmp_path / 'run'}"]) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "is cut" in line]
    assert re.search(rf"tokenizer reads \d+ of {len(WORDS.strip())} tokens, not '", line)
    (output,) = json.loads((tmp_path / "run" / "run.json").read_text())["outputs"]
    (cut,) = [one for one in output["cuts"] if one["text"] == "prompt"]
    assert (cut["tokenizer"], cut["tokens"]) == ("tokenizer", len(WORDS.strip()))  # each character is a token
    assert 0 < cut["read"] < LIMIT
    assert cut["cut"] == WORDS.strip()[cut["read"] :].strip()
    assert png.read_png(tmp_path / "run" / output["path"])[1]["cuts"] == output["cuts"]


def test_a_strict_run_refuses_it(tiny_folder, tmp_path, capsys):
    words = [*tiny.overrides(tiny_folder), f"sampling.prompt={WORDS}", f"sampling.max_sequence_length={LIMIT}"]
    assert main.main([*words, "strict_prompt=true", f"hydra.run.dir={tmp_path / 'run'}"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("strict_prompt=true: the prompt 'a red cat")
    assert last.endswith("shorten it, or strict_prompt=false to draw what is read")
    assert not list((tmp_path / "run").glob("*.png"))
    assert (
        main.main([*words, "strict_prompt=true", "sampling.prompt=a cat", f"hydra.run.dir={tmp_path / 'other'}"]) == 0
    )


def test_from_python_it_is_a_warning(tiny_folder):
    runner = hydrarun.load(*tiny.overrides(tiny_folder))
    with pytest.warns(UserWarning, match="is cut: tokenizer reads"):
        runner.generate(prompt=WORDS, max_sequence_length=LIMIT, num_inference_steps=2)


def test_one_encoder_that_reads_all_is_enough():
    short, whole = ReadPrompt("tokenizer", 90, 77, "the end"), ReadPrompt("tokenizer_2", 95, 95, "")
    refuse_lost_words({"a": [short, whole]})
    assert describe_cut("a", [short, whole]) == (
        "the prompt 'a' is cut: tokenizer reads 77 of 90 tokens, not 'the end' (tokenizer_2 reads all)"
    )
    with pytest.raises(UsageError, match="strict_prompt=true: "):
        refuse_lost_words({"a": [short, whole._replace(cut="end")]})


def test_ranks_tell_what_each_of_them_cuts(pool, tiny_folder):
    from tests.helpers import parallel_runs

    fields = {"prompt": ["a cat", WORDS], "seed": [1, 2], "max_sequence_length": LIMIT, "num_inference_steps": 2}
    for cuts in pool(2, parallel_runs.list_cuts, "qwen_image", tiny_folder, {"data_degree": 2}, fields):
        assert [len(one) for one in cuts] == [0, 1]
