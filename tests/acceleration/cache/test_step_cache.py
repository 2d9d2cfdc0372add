"""Gates and predictors on a transformer whose numbers are all known."""

from __future__ import annotations

import itertools

import pytest
import torch

from hydrarun.acceleration.cache.base import NoCache
from hydrarun.acceleration.cache.gates import choose_scm_steps
from hydrarun.acceleration.cache.predictors import Reuse, Taylor, find_extrapolation
from hydrarun.config.targets import instantiate
from hydrarun.core.errors import UsageError
from tests.helpers.caches import Toy, loop, mask, node, schedule

FACTORS = {"positive": 1.0, "negative": -0.5}
TIMES = [1.0, 0.96, 0.9, 0.7, 0.55, 0.5, 0.3, 0.22, 0.1, 0.02]  # at uneven distances


def run(cache_node, coefficients=(1.0, 2.0, 3.0), times=TIMES, boundary=0.0):
    """Predictions, the transformers and the record."""
    toys = {name: Toy(list(coefficients)) for name in ("transformer", "transformer_2")}
    cache = instantiate(cache_node, "cache")
    made = loop(cache, toys, schedule(times, boundary), FACTORS)
    return made, toys, cache


def furthest(made, other) -> float:
    return max((a[branch] - b[branch]).abs().max().item() for a, b in zip(made, other, strict=True) for branch in a)


@pytest.fixture
def plain():
    return run({"_target_": "hydrarun.acceleration.cache.base.NoCache"})[0]


@pytest.mark.parametrize(
    ("predictor", "order", "degree"), [("reuse", None, 0), ("taylor", 1, 0), ("taylor", 1, 1), ("taylor", 2, 2)]
)
def test_a_predictor_is_exact_where_its_order_fits(predictor, order, degree):
    """The residual is a polynomial of that degree; computed and skipped steps are unevenly spaced."""
    coefficients = [1.0, 2.0, 3.0][: degree + 1]
    exact = run({"_target_": "hydrarun.acceleration.cache.base.NoCache"}, coefficients)[0]
    made, _, cache = run(mask([0, 1, 3, 6], predictor, order), coefficients)
    assert cache.record()["steps"]["transformer"]["negative"]["skipped"] == [2, 4, 5, 7, 8, 9]
    if degree == 2:  # a parabola needs three points; before that the predictor uses a straight line
        made, exact = made[4:], exact[4:]
    assert furthest(made, exact) < 1e-12


@pytest.mark.parametrize(("order", "degree"), [(None, 1), (1, 2)])
def test_and_not_where_it_does_not(order, degree):
    coefficients = [1.0, 2.0, 3.0][: degree + 1]
    exact = run({"_target_": "hydrarun.acceleration.cache.base.NoCache"}, coefficients)[0]
    made, _, _ = run(mask([0, 1, 3, 6], "taylor" if order else "reuse", order), coefficients)
    assert furthest(made, exact) > 0.01


def test_extrapolation_weights():
    assert find_extrapolation((3.0,), 1.0) == [1.0]
    assert find_extrapolation((3.0, 2.0), 1.0) == [-1.0, 2.0]
    assert find_extrapolation((3.0, 2.0, 1.0), 0.0) == [1.0, -3.0, 3.0]


def test_a_timestep_that_comes_twice_counts_once():
    """As with Heun: two points at one timestep would lead to a division by their distance, 0."""
    predictor = Taylor(order=1)
    for time, value in ((3.0, 1.0), (2.0, 5.0), (2.0, 4.0)):
        predictor.update(("transformer", "positive"), time, torch.tensor(value))
    assert predictor.extrapolate(("transformer", "positive"), 1.0) == 7.0


def test_an_order_that_is_none_is_refused():
    with pytest.raises(UsageError, match=r"^cache.predictor.order: 3 is not 1 or 2$"):
        Taylor(order=3)


@pytest.mark.parametrize(
    "cache_node",
    [
        mask(list(range(10))),
        mask(list(range(10)), "taylor", 2),
        node("every_n", n=1),
        node("teacache", threshold=0),
        node("first_block", threshold=0),
    ],
)
def test_nothing_skipped_is_the_plain_run_to_the_bit(cache_node, plain):
    made, _, cache = run(cache_node)
    assert furthest(made, plain) == 0
    assert cache.record()["blocks"] == {"run": 40, "all": 40}


def test_a_threshold_of_zero_computes_even_what_does_not_change():
    for name in ("teacache", "first_block"):
        _, _, cache = run(node(name, threshold=0), [1.0], [0.5] * 5)
        assert cache.record()["blocks"] == {"run": 20, "all": 20}


@pytest.mark.parametrize(
    ("cache_node", "steps"),
    [
        (mask([0, 1, 4, 8]), [0, 1, 4, 8]),
        (mask([8, 0, 4]), [0, 4, 8]),
        (node("every_n", n=3), [0, 3, 6, 9]),
        (node("every_n", n=4, first=2, last=2), [0, 1, 4, 8, 9]),
        (node("every_n", n=4, last=0), [0, 4, 8]),
        (node("mask", density="ultra"), [0, 1, 3, 6, 9]),
        (node("first_block", threshold=1e9, first=3, last=2), [0, 1, 2, 8, 9]),
        (node("teacache", threshold=1e9, first=2, last=1), [0, 1, 9]),
    ],
)
def test_exactly_the_said_steps_are_computed(cache_node, steps):
    """Checked by the transformer's own calls and by the record."""
    _, toys, cache = run(cache_node)
    assert toys["transformer"].run_at == [TIMES[step] for step in steps for _ in FACTORS]
    for branch in FACTORS:
        found = cache.record()["steps"]["transformer"][branch]
        assert found["computed"] == steps
        assert found["skipped"] == [step for step in range(10) if step not in steps]
    prefix = 10 - len(steps) if "FirstBlock" in str(cache_node) else 0  # the first block of skipped steps
    assert cache.record()["blocks"] == {"run": 2 * (2 * len(steps) + prefix), "all": 40}


def test_each_expert_computes_its_first_step():
    """Each expert also has its own every-n count and its own residuals."""
    for cache_node, steps in (
        (node("every_n", n=3, last=0), [0, 3, 4, 7]),
        (node("first_block", threshold=1e9, last=0), [0, 4]),
        (node("teacache", threshold=1e9, last=0), [0, 4]),
        (node("mask", density="ultra"), [0, 1, 3, 4, 6, 9]),
    ):
        _, toys, cache = run(cache_node, boundary=0.6)
        assert toys["transformer"].run_at[::2] + toys["transformer_2"].run_at[::2] == [TIMES[i] for i in steps]
        record = cache.record()["steps"]
        computed = record["transformer"]["positive"]["computed"] + record["transformer_2"]["positive"]["computed"]
        assert computed == steps
        assert (
            max(record["transformer"]["positive"]["skipped"]) < 4 <= min(record["transformer_2"]["positive"]["skipped"])
        )


def test_the_densities_are_the_published_ones():
    """Numbers of computed steps of 28 in cache-dit's SCM."""
    assert {name: len(choose_scm_steps(name, 28)) for name in ("slow", "medium", "fast", "ultra")} == {
        "slow": 18,
        "medium": 15,
        "fast": 11,
        "ultra": 8,
    }


def test_a_list_must_hold_each_experts_first_step():
    with pytest.raises(
        UsageError, match=r"^cache.gate.steps: step 4 is the first of transformer_2, .*put 4 into the list"
    ):
        run(mask([0, 2, 5]), boundary=0.6)
    with pytest.raises(UsageError, match=r"^cache.gate.steps: step 0 is the first of transformer, "):
        run(mask([2, 5]))


@pytest.mark.parametrize(
    ("cache_node", "message"),
    [
        (mask([0, 10]), r"^cache.gate.steps: 10 is not a step of this run of 10 steps, numbered 0 to 9$"),
        (mask([0, -1]), r"^cache.gate.steps: -1 is not a step"),
        (mask([0, 3, 3]), r"^cache.gate.steps: a step is listed twice$"),
        (node("mask", steps=[0]), "give one of steps=.* and density=.*, not both"),
        (node("mask", density=None), "give one of steps=.* and density="),
        (node("mask", density="quick"), "cache.gate.density: 'quick' is not one of slow, medium, fast, ultra or null"),
        (node("every_n", n=0), "cache.gate.n: 0 is below 1"),
        (node("every_n", first=0), "cache.gate.first: 0 is below 1"),
        (node("teacache", last=-1), "cache.gate.last: -1 is below 0"),
        (node("first_block", threshold=-0.1), "cache.gate.threshold: -0.1 is not a finite number >= 0"),
        (node("first_block", threshold=float("nan")), "cache.gate.threshold: nan is not a finite number >= 0"),
        (node("first_block", treshold=1), "cache.gate.treshold: FirstBlock takes no such argument. Did you mean"),
    ],
)
def test_what_cannot_be_is_refused(cache_node, message):
    with pytest.raises(UsageError, match=message):
        run(cache_node)


def test_first_block_compares_with_the_last_computed_step():
    """Its block adds 1 + t in the branch with factor 1, so the relative changes are known."""
    times = [1.0, 0.9, 0.8, 0.7, 0.6]
    _, _, cache = run(node("first_block", threshold=0.12, last=0), [1.0, 1.0], times)
    # 1.9 / 2: 0.05, 1.8 / 2: 0.1, 1.7 / 2: 0.15 is computed, 1.6 / 1.7: 0.06
    assert cache.record()["steps"]["transformer"]["positive"]["computed"] == [0, 3]


def test_teacache_accumulates_the_rescaled_change_from_step_to_step():
    times = [10.0, 9.0, 8.0, 7.0, 6.0, 5.0]
    toys = {"transformer": Toy([1.0])}
    latents = torch.linspace(-1, 1, 30, dtype=torch.float64)
    signals = [latents + time for time in times]
    changes = [
        ((b - a).abs().sum() / a.abs().sum()).item() for a, b in itertools.pairwise(signals)
    ]  # 0.1, 0.111, 0.125, ...
    cache_node = node("teacache", threshold=0.5, last=0)
    cache_node["gate"]["fit"] = {"coefficients": {"transformer": [20.0, 0.0, 0.0]}}
    total, computed = 0.0, [0]
    for index, change in enumerate(changes, start=1):
        total += 20.0 * change**2
        if total >= 0.5:
            computed.append(index)
            total = 0.0
    assert computed == [0, 3, 5]
    cache = instantiate(cache_node, "cache")
    loop(cache, toys, schedule(times), FACTORS)
    assert cache.record()["steps"]["transformer"]["positive"]["computed"] == computed


def test_a_polynomial_below_zero_counts_as_zero():
    cache_node = node("teacache", threshold=0.001, last=0)
    cache_node["gate"]["fit"] = {"coefficients": {"transformer": [-1.0, 0.0]}}
    _, _, cache = run(cache_node)
    assert cache.record()["steps"]["transformer"]["positive"]["computed"] == [0]


def test_one_decision_for_both_branches():
    """The branch that changes more decides. The first block adds nothing in one branch, so that one never changes."""
    toys = {"transformer": Toy([0.0, 1.0])}
    cache = instantiate(node("first_block", threshold=0.3, last=0), "cache")
    loop(cache, toys, schedule([1.0, 0.9, 0.5, 0.4]), {"positive": 0.0, "negative": 1.0})
    record = cache.record()["steps"]["transformer"]
    assert record["positive"] == record["negative"] == {"computed": [0, 2], "skipped": [1, 3]}


def test_a_request_knows_nothing_of_the_one_before():
    """The same cache runs other timesteps and then the first ones again; nothing is kept between requests."""
    toys = {"transformer": Toy([1.0, 2.0, 3.0])}
    for cache_node in (mask([0, 2, 4], "taylor", 2), node("teacache", threshold=0.1), node("first_block")):
        cache = instantiate(cache_node, "cache")
        plan = schedule(TIMES)
        fresh = loop(cache, toys, plan, FACTORS)
        record = cache.record()
        assert not cache.signals
        assert not cache.predictor.known
        loop(cache, toys, schedule([5.0, 4.0, 3.0, 2.0, 1.0]), FACTORS)
        assert furthest(loop(cache, toys, plan, FACTORS), fresh) == 0
        assert cache.record() == record


def test_a_request_that_broke_off_leaves_nothing():
    toys = {"transformer": Toy([1.0, 2.0, 3.0])}
    cache = instantiate(node("first_block"), "cache")
    fresh = loop(cache, toys, schedule(TIMES), FACTORS)
    with pytest.raises(KeyError):
        loop(cache, toys, schedule(TIMES, boundary=0.6), FACTORS)  # there is no second expert
    assert furthest(loop(cache, toys, schedule(TIMES), FACTORS), fresh) == 0


def test_seconds_of_the_two_kinds_of_steps():
    _, _, cache = run(mask([0, 1, 4]), times=TIMES[:5])
    results = cache.summarize([9.0, 7.0, 0.2, 0.4, 8.0])
    assert results["computed_step_s"] == 8.0
    assert results["skipped_step_s"] == pytest.approx(0.3)
    assert results["steps"] == cache.record()["steps"]


def test_no_cache_says_that_all_was_computed():
    cache = NoCache()
    loop(cache, {"transformer": Toy([1.0])}, schedule(TIMES), FACTORS)
    assert cache.record()["steps"]["transformer"]["negative"] == {"computed": list(range(10)), "skipped": []}
    assert cache.summarize([1.0] * 10)["skipped_step_s"] is None


def test_reuse_keeps_one_residual():
    predictor = Reuse()
    for time in (3.0, 2.0):
        predictor.update(("transformer", "positive"), time, torch.tensor(time))
    assert predictor.known["transformer", "positive"] == [(2.0, torch.tensor(2.0))]
