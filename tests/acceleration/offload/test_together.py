"""Offload, quantization and caches together: each works as it does alone."""

from __future__ import annotations

import pytest
import torch

from hydrarun.config.compose import compose_config
from hydrarun.engine.runner import Runner
from tests.helpers import tiny

QUANTIZED = ["quantization=int8_weight_only", "quantization.components=[transformer,text_encoder]"]


def latents(folder, model: str, *more: str) -> list[torch.Tensor]:
    """Return the latents of two requests in a row."""
    runner = Runner(compose_config([*tiny.overrides(folder, model), "sampling.num_inference_steps=6", *more]))
    return [tiny.draw(runner).latents for _ in range(2)]


@pytest.mark.sample(1)
@pytest.mark.parametrize("subject", ["qwen_image", "flux_dev"], indirect=True)
@pytest.mark.parametrize("cache", ["cache=none", "cache=every_n"])
def test_a_quantized_text_encoder_that_was_let_go_comes_back_quantized(subject, cache):
    want, _ = latents(subject.folder, subject.name, *QUANTIZED, cache)
    for have in latents(subject.folder, subject.name, *QUANTIZED, cache, "offload=text_encoder"):
        assert torch.equal(have, want)
    plain, _ = latents(subject.folder, subject.name, cache)
    assert not torch.equal(plain, want)


@pytest.mark.parametrize("subject", ["qwen_image", "flux_dev"], indirect=True)
def test_tables_stand_beside_quantized_blocks(subject):
    """Modulation is not quantized, so the tables are those of the plain run."""
    want, _ = latents(subject.folder, subject.name, *QUANTIZED[:1])
    for have in latents(subject.folder, subject.name, *QUANTIZED[:1], "offload=modulation"):
        assert (have - want).abs().max() <= 1e-5  # a matrix product of many rows sums in another order
