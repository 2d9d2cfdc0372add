"""Notes about requests that are drawn as asked, but perhaps not as expected."""

from __future__ import annotations

import json

import pytest

import hydrarun
from hydrarun.cli import main
from hydrarun.config.checks.notes import find_notes
from hydrarun.config.compose import compose_config
from hydrarun.core.errors import UsageError
from hydrarun.engine.ranks import launch

UNUSED = "sampling.negative_prompt is not used: sampling.true_cfg_scale=1.0 turns guidance off"


def notes(*words: str, negative: bool = False) -> list[str]:
    return [*find_notes(compose_config(words), negative)]


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ([f"sampling.seed={2**32 - 1}"], []),
        ([f"sampling.seed={2**32}"], [f"sampling.seed: {2**32} draws the same noise as 0: 32 bits of a seed are used"]),
        ([f"sampling.seed=[1,{2**40 + 7}]"], [f"sampling.seed: {2**40 + 7} draws the same noise as 7: 32 bits"]),
        ([f"sampling.seed={2**32 - 1}", "sampling.num_images_per_prompt=2"], [f"sampling.seed: {2**32} draws"]),
    ],
)
def test_a_seed_of_more_than_32_bits(words, found):
    said = notes(*words)
    assert len(said) == len(found)
    assert all(one.startswith(want) for one, want in zip(said, found, strict=True))


def test_the_same_noise_is_drawn(tiny_runner):
    """What the note says."""
    one, other = (
        tiny_runner.draw(tiny_runner.prepare_state(config, []), None or timings())
        for config in (
            {
                **tiny_runner.config,
                "sampling": {**tiny_runner.config["sampling"], "seed": seed, "num_inference_steps": 2},
            }
            for seed in (5, 2**32 + 5)
        )
    )
    assert (one.frames == other.frames).all()


def timings():
    import torch

    from hydrarun.core.timing import Timings

    return Timings(torch.device("cpu"))


def test_a_negative_prompt_without_guidance(tmp_path):
    assert notes("sampling.true_cfg_scale=1", "sampling.negative_prompt=x") == []  # the user did not give it
    assert notes("sampling.true_cfg_scale=1", "sampling.negative_prompt=x", negative=True) == [UNUSED]
    file = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "a", "negative_prompt": "b", "true_cfg_scale": 1.0}, {"prompt": "c"}]
    rows += [{"prompt": "d", "negative_prompt": "e", "true_cfg_scale": 1.0}, {"prompt": "f", "negative_prompt": "g"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert notes(f"input.prompts={file}") == [f"input.prompts, lines 1, 3: {UNUSED}"]


def test_the_command_prints_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(launch, "run_configuration", lambda config, output_dir: {})
    assert main.main([f"sampling.seed={2**32}", f"hydra.run.dir={tmp_path / 'run'}"]) == 0
    assert f"sampling.seed: {2**32} draws the same noise as 0" in capsys.readouterr().err


def test_python_warns(tiny_folder, monkeypatch):
    from tests.helpers import tiny

    words = [*tiny.overrides(tiny_folder), "sampling.true_cfg_scale=1", "sampling.negative_prompt=x"]
    with pytest.warns(UserWarning, match="sampling.negative_prompt .command line. is not used"):
        runner = hydrarun.load(*words)
    with pytest.warns(UserWarning, match="^sampling.negative_prompt is not used"):
        runner.generate(negative_prompt="y", num_inference_steps=2)
    with pytest.warns(UserWarning, match="32 bits of a seed"):
        runner.generate(seed=2**33, num_inference_steps=2)
    with pytest.raises(UsageError, match="sampling.prompt: holds half of a surrogate pair, character 2"):
        runner.generate(prompt="a\ud800")
