"""Cache-DiT behind our contract: which blocks are computed, and what is recorded."""

from __future__ import annotations

import json
import weakref

import pytest
import torch

from hydrarun.config.targets import instantiate
from hydrarun.engine.runner import Runner
from tests.helpers.dbcache import Counter, guided, node, record
from tests.helpers.subjects import LONG, SHORT, SORTS

TWO_EXPERTS = "wan22_t2v_a14b"
ALWAYS = {"residual_diff_threshold": 1.0, "max_continuous_cached_steps": -1}


def firsts(subject, steps: int = 8) -> list[int]:
    """The first step of each expert, by a run without a cache."""
    subject.draw(**guided(subject, steps))
    return [branches["positive"]["computed"][0] for branches in record(subject)["steps"].values()]


def check_computed(subject, computed: set[int], steps: int, **arguments) -> None:
    """Check, by the record and the call counts, that `computed` steps run all blocks and the others only Fn and Bn."""
    with Counter(subject) as calls:
        subject.draw(cache=node(**arguments), **guided(subject, steps))
    found = record(subject)
    first, last = arguments.get("Fn_compute_blocks", 1), arguments.get("Bn_compute_blocks", 0)
    every = []
    for expert, branches in found["steps"].items():
        own = sorted(branches["positive"]["computed"] + branches["positive"]["skipped"])
        every += own
        run = [step for step in own if step in computed]
        decided = {"computed": run, "skipped": [step for step in own if step not in computed]}
        assert branches == {"positive": decided, "negative": decided}
        depth = len(calls[expert])
        middle = [2 * len(run)] * (depth - first - last)
        assert calls[expert] == [2 * len(own)] * first + middle + [2 * len(own)] * last
    assert every == list(range(steps))
    assert found["blocks"]["run"] == sum(map(sum, calls.values()))
    assert found["blocks"]["all"] == 2 * steps * depth


@pytest.mark.sample(3)
@pytest.mark.parametrize("subject", SORTS, indirect=True)
@pytest.mark.parametrize("prune", [False, True])
def test_a_threshold_of_zero_is_the_plain_run(subject, prune):
    plain = subject.draw(**guided(subject)).latents
    cached = subject.draw(cache=node(residual_diff_threshold=0.0, prune=prune), **guided(subject)).latents
    assert torch.equal(cached, plain)
    assert record(subject)["blocks"]["run"] == record(subject)["blocks"]["all"] > 0


@pytest.mark.parametrize("subject", SORTS, indirect=True)
def test_always_similar_computes_the_warm_up_and_each_experts_first_step(subject):
    check_computed(subject, {0, 1, *firsts(subject)}, 8, max_warmup_steps=2, **ALWAYS)


@pytest.mark.parametrize("subject", [TWO_EXPERTS], indirect=True)
def test_a_long_warm_up_goes_on_in_the_second_expert(subject):
    assert firsts(subject) == [0, 3]
    check_computed(subject, {0, 1, 2, 3, 4}, 8, max_warmup_steps=5, **ALWAYS)


@pytest.mark.parametrize("subject", ["flux_dev"], indirect=True)
def test_the_blocks_of_both_lists_are_one_decision(subject):
    check_computed(subject, {0, 1}, 4, Fn_compute_blocks=2, Bn_compute_blocks=1, max_warmup_steps=2, **ALWAYS)


@pytest.mark.parametrize("subject", ["qwen_image", TWO_EXPERTS], indirect=True)
def test_no_more_steps_are_skipped_in_a_row_than_may_be(subject):
    second = firsts(subject, 12)[1:]
    expected = {0, 3, 6, 9} if not second else {0, 3, second[0], second[0] + 3, second[0] + 6}
    settings = {**ALWAYS, "max_continuous_cached_steps": 2}
    check_computed(subject, expected, 12, max_warmup_steps=1, **settings)


@pytest.mark.parametrize("subject", ["qwen_image"], indirect=True)
def test_no_more_steps_are_skipped_in_all_than_may_be(subject):
    check_computed(subject, {0, 4, 5, 6, 7}, 8, max_warmup_steps=1, max_cached_steps=3, **ALWAYS)


@pytest.mark.parametrize("subject", ["qwen_image", TWO_EXPERTS], indirect=True)
@pytest.mark.parametrize("density", ["slow", "medium", "fast", "ultra"])
def test_a_static_mask_is_the_whole_schedules(subject, density):
    from cache_dit import steps_mask

    mask = steps_mask(mask_policy=density, total_steps=12)
    expected = {index for index, computed in enumerate(mask) if computed} | {*firsts(subject, 12)}
    assert len(expected) < 12
    check_computed(
        subject, expected, 12, steps_computation_mask=density, steps_computation_policy="static", max_warmup_steps=8
    )


@pytest.mark.parametrize("subject", ["demo"], indirect=True)
def test_a_dynamic_mask_computes_its_steps_and_those_that_differ(subject):
    settings = {"steps_computation_mask": "fast", "steps_computation_policy": "dynamic", "max_warmup_steps": 1}
    subject.draw(cache=node(**settings, **ALWAYS), **guided(subject, 12))
    mask = record(subject)["steps"]["transformer"]["positive"]["computed"]
    subject.draw(cache=node(**settings, residual_diff_threshold=0.1), **guided(subject, 12))
    some = record(subject)["steps"]["transformer"]["positive"]["computed"]
    assert {*mask} < {*some} < {*range(12)}


@pytest.mark.parametrize("subject", ["demo"], indirect=True)
def test_the_record_has_what_was_measured(subject):
    subject.draw(cache=node(residual_diff_threshold=0.13, max_warmup_steps=2), **guided(subject, 12))
    found = record(subject)
    assert json.loads(json.dumps(found)) == found
    for branch in ("positive", "negative"):
        steps = found["steps"]["transformer"][branch]
        differences = found["statistics"]["transformer"][branch]["residual_diffs"]
        near = [int(step) for step, difference in differences.items() if difference < 0.13]
        assert steps["skipped"] == near
        assert {*range(2, 12)} - {*map(int, differences)} <= {*steps["computed"]}  # after three in a row, unmeasured
        assert len(near) > 3 < len(steps["computed"])


@pytest.mark.parametrize("subject", ["demo"], indirect=True)
def test_taylorseer_is_nearer_to_the_plain_run_than_reuse(subject):
    """On the trained model, whose residuals change smoothly."""
    plain = subject.draw(**guided(subject, 16)).latents
    settings = {**ALWAYS, "max_warmup_steps": 3, "max_continuous_cached_steps": 1}
    errors = []
    for order in (None, 1, 2):
        cached = subject.draw(cache=node(taylorseer_order=order, **settings), **guided(subject, 16)).latents
        errors.append((cached - plain).abs().mean().item())
    reuse, line, parabola = errors
    assert 0 < line < 0.8 * reuse
    assert 0 < parabola < 0.8 * reuse
    assert line != parabola


@pytest.mark.parametrize("subject", ["demo"], indirect=True)
def test_dbprune_skips_single_blocks_and_counts_them(subject):
    with Counter(subject) as calls:
        subject.draw(cache=node(prune=True, residual_diff_threshold=0.15, max_warmup_steps=2), **guided(subject, 12))
    found = record(subject)
    assert json.loads(json.dumps(found)) == found
    assert found["blocks"] == {"run": sum(calls["transformer"]), "all": 2 * 12 * 6}
    assert calls["transformer"][0] == 24  # the first block is never pruned
    statistics = found["statistics"]["transformer"]
    counts = [count for branch in statistics.values() for count in branch["pruned_blocks"]]
    assert sum(counts) == found["blocks"]["all"] - found["blocks"]["run"]
    assert any(0 < count < 5 for count in counts)
    for branch, steps in found["steps"]["transformer"].items():
        pruned = statistics[branch]["pruned_blocks"]
        assert len(pruned) == 12
        assert steps["skipped"] == [step for step, count in enumerate(pruned) if count]
        for step, differences in statistics[branch]["residual_diffs"].items():
            assert pruned[int(step)] == sum(difference < 0.15 for difference in differences)


@pytest.mark.parametrize("subject", ["demo"], indirect=True)
def test_dbprune_that_always_prunes_runs_the_first_and_last_blocks(subject):
    check_computed(subject, {0, 1}, 5, prune=True, max_warmup_steps=2, Bn_compute_blocks=2, **ALWAYS)
    assert record(subject)["statistics"]["transformer"]["negative"]["pruned_blocks"] == [0, 0, 3, 3, 3]


@pytest.fixture
def one_cache(monkeypatch):
    """One cache for all requests; a runner makes a new one for each."""
    cache = instantiate(node(residual_diff_threshold=0.13, max_warmup_steps=2, taylorseer_order=1))
    monkeypatch.setattr(Runner, "get_cache", lambda *_: cache)
    return cache


@pytest.mark.parametrize("subject", ["demo"], indirect=True)
def test_requests_in_a_row_are_as_if_each_were_the_first(subject, one_cache, monkeypatch):
    requests = [{**guided(subject, 12), "prompt": prompt, "seed": seed} for prompt, seed in ((SHORT, 1), (LONG, 2))]
    in_a_row = [(subject.draw(**request).latents, record(subject)) for request in requests]
    monkeypatch.undo()
    settings = {"residual_diff_threshold": 0.13, "max_warmup_steps": 2, "taylorseer_order": 1}
    for request, (latents, found) in zip(requests, in_a_row, strict=True):
        assert torch.equal(subject.draw(cache=node(**settings), **request).latents, latents)
        assert record(subject) == found
        assert found["steps"]["transformer"]["positive"]["skipped"]


@pytest.mark.parametrize("subject", ["demo"], indirect=True)
def test_a_request_that_breaks_off_does_not_spoil_the_next(subject, one_cache):
    (transformer,) = subject.runner.built.parts.experts.transformers.values()
    *_, last = transformer.all_blocks()
    fresh = subject.draw(**guided(subject, 12)).latents
    found = record(subject)
    calls = []

    def fail_at_the_seventh(*_):
        calls.append(0)
        if len(calls) == 7:
            raise ZeroDivisionError

    handle = last.register_forward_hook(fail_at_the_seventh)
    with pytest.raises(ZeroDivisionError):
        subject.draw(**{**guided(subject, 12), "seed": 9})
    handle.remove()
    assert one_cache.summarize([1.0, 1.0, 1.0, 1.0])["computed_step_s"] == 1.0  # the steps that ran are recorded
    assert torch.equal(subject.draw(**guided(subject, 12)).latents, fresh)
    assert record(subject) == found


@pytest.mark.parametrize("subject", ["demo"], indirect=True)
@pytest.mark.parametrize("prune", [False, True])
def test_nothing_is_kept_after_a_request(subject, prune, monkeypatch):
    cache = instantiate(node(prune=prune, max_warmup_steps=1, taylorseer_order=1))
    monkeypatch.setattr(Runner, "get_cache", lambda *_: cache)
    kept = []
    end = cache.end
    monkeypatch.setattr(cache, "end", lambda: (kept.append(weakref.ref(cache.manager)), end()))
    subject.draw(**guided(subject, 4))
    assert kept[0]() is None
    assert cache.blocks == {}
