"""Caches on every model: exact if nothing is skipped, else exactly the chosen steps are computed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hydrarun.config.checks.values import find_cfg_scale
from hydrarun.config.compose import compose_config
from hydrarun.engine.runner import Runner
from hydrarun.models.transformer import Step, Transformer
from tests.helpers import tiny
from tests.helpers.caches import mask, node
from tests.helpers.subjects import CONFIGS, FAMILIES, LONG, SHORT, SORTS

STEPS = 6  # enough for two experts to have some each


def request(subject, **fields):
    """A guided run."""
    return {
        find_cfg_scale(CONFIGS[subject.name])[0]: 3.0,
        "negative_prompt": LONG,
        "num_inference_steps": STEPS,
        **fields,
    }


@pytest.fixture(scope="module")
def plains() -> dict[str, torch.Tensor]:
    """Latents of the plain guided run, by model."""
    return {}


def plain(subject, plains) -> torch.Tensor:
    if subject.name not in plains:
        plains[subject.name] = subject.draw(**request(subject)).latents
    return plains[subject.name]


def firsts(subject) -> list[int]:
    """The first step of each expert of the last request."""
    steps = subject.runner.built.parts.cache.record()["steps"]
    return sorted(min(branch["computed"]) for branch in (expert["positive"] for expert in steps.values()))


@pytest.fixture
def runs(monkeypatch) -> list[tuple[str, str, int]]:
    """`(expert, branch, step)` of every call of a transformer's blocks, noted where the blocks are run."""
    seen: list[tuple[str, str, int]] = []
    begin, run, forward = Transformer.begin_branch, Transformer.run_blocks, Transformer.forward
    now: list[Step] = []

    def noting_forward(self, inputs, step, cache):
        now[:] = [step]
        return forward(self, inputs, step, cache)

    def noting_begin(self, inputs, branch):
        call = begin(self, inputs, branch)
        call.branch = branch
        return call

    def noting_run(self, call, *blocks):
        branch = getattr(call, "branch", None)  # a plain run does not call `begin_branch`
        seen.append((now[0].expert, branch, now[0].index))
        run(self, call, *blocks)

    monkeypatch.setattr(Transformer, "forward", noting_forward)
    monkeypatch.setattr(Transformer, "begin_branch", noting_begin)
    monkeypatch.setattr(Transformer, "run_blocks", noting_run)
    return seen


@pytest.mark.sample(5)
@pytest.mark.parametrize("subject", FAMILIES, indirect=True)
def test_nothing_skipped_is_the_plain_run_to_the_bit(subject, plains):
    want = plain(subject, plains)
    for cache in (mask(list(range(STEPS)), "taylor"), node("teacache", threshold=0), node("first_block", threshold=0)):
        assert torch.equal(subject.draw(cache=cache, **request(subject)).latents, want)
        assert subject.runner.built.parts.cache.record()["blocks"]["run"] > 0


@pytest.mark.parametrize("subject", SORTS, indirect=True)
def test_a_mask_computes_exactly_its_steps(subject, plains, runs):
    """For both branches, each expert with its own transformer; the latents differ from the plain run."""
    want = plain(subject, plains)
    starts = firsts(subject)
    steps = sorted({0, 1, *starts})
    runs.clear()
    latents = subject.draw(cache=mask(steps), **request(subject)).latents
    experts = ["transformer" if len(starts) == 1 or step < starts[1] else "transformer_2" for step in range(STEPS)]
    assert len(set(experts)) == CONFIGS[subject.name]["model"]["experts"]
    assert runs == [(experts[step], branch, step) for step in steps for branch in ("positive", "negative")]
    record = subject.runner.built.parts.cache.record()["steps"]
    for expert, branches in record.items():
        own = [step for step in range(STEPS) if experts[step] == expert]
        for branch in ("positive", "negative"):
            assert branches[branch]["computed"] == [step for step in own if step in steps]
            assert branches[branch]["skipped"] == [step for step in own if step not in steps]
    assert (latents - want).abs().max() > 1e-3


@pytest.mark.sample(2)
@pytest.mark.parametrize("subject", SORTS, indirect=True)
def test_a_run_knows_nothing_of_the_one_before(subject):
    """Two prompts in a row give bit-identical results to fresh runs; the measuring gates skip some steps."""
    one, other = {"prompt": SHORT, "seed": 1}, {"prompt": LONG, "seed": 2}
    for cache in (node("teacache", "taylor", threshold=0.6), node("first_block", threshold=0.2)):
        fresh = subject.draw(cache=cache, **request(subject, **other)).latents
        decided = subject.runner.built.parts.cache.record()
        subject.draw(cache=cache, **request(subject, **one))
        assert torch.equal(subject.draw(cache=cache, **request(subject, **other)).latents, fresh)
        assert subject.runner.built.parts.cache.record() == decided


@pytest.mark.parametrize("subject", SORTS, indirect=True)
def test_a_batch_is_its_items(subject, plains):
    """With a planned gate, whose steps do not depend on the items; prompts of unequal length."""
    plain(subject, plains)
    cache = mask(sorted({0, 1, *firsts(subject)}), "taylor")
    both = request(subject, prompt=[SHORT, LONG], seed=[3, 4], negative_prompt=["x", LONG])
    batch = subject.draw(cache=cache, **both).latents
    for index, negative in enumerate(("x", LONG)):
        single = request(subject, prompt=both["prompt"][index], seed=both["seed"][index], negative_prompt=negative)
        alone = subject.draw(cache=cache, **single).latents
        large = max(1.0, float(alone.abs().max()) / 10)  # the extrapolation can reach large values
        assert (batch[index : index + 1] - alone).abs().max() <= 1e-4 * large  # as without a cache: other matrix shapes


@pytest.mark.sample(1)
@pytest.mark.parametrize("subject", ["qwen_image", "flux_dev", "wan22_t2v_a14b"], indirect=True)
def test_gates_skip_more_as_the_threshold_rises(subject):
    for name in ("teacache", "first_block"):
        run = []
        for threshold in (0.0, 0.1, 0.5, 1e9):
            subject.draw(cache=node(name, threshold=threshold, last=0), **request(subject))
            run.append(subject.runner.built.parts.cache.record()["blocks"]["run"])
        assert run == sorted(run, reverse=True)
        assert run[-1] < run[0]


def test_on_a_trained_model_a_line_is_nearer_than_the_last_residual():
    """Every second step of 24 is skipped: the predictor recovers part of the error."""
    runner = Runner(compose_config(["device=cpu"]))
    want = tiny.draw(runner).latents
    reuse, line = (
        (tiny.draw(runner, cache=node("every_n", predictor)).latents - want).square().mean().item()
        for predictor in (None, "taylor")
    )
    assert 0 < line < reuse / 2


@pytest.mark.parametrize("subject", ["flux_dev"], indirect=True)
def test_compiled_blocks_are_skipped_too(subject, plains):
    cache = mask([0, 1, 3], "taylor")
    want = subject.draw(cache=cache, **request(subject)).latents
    blocks = [block for transformer in subject.runner.built.parts.experts for block in transformer.all_blocks()]
    plain_calls = [block._compiled_call_impl for block in blocks]
    try:
        for block in blocks:
            block.compile(fullgraph=True, backend="eager")
        have = subject.draw(cache=cache, **request(subject)).latents
    finally:
        for block, call in zip(blocks, plain_calls, strict=True):
            block._compiled_call_impl = call
    assert np.abs(have.numpy() - want.numpy()).max() <= 1e-5
