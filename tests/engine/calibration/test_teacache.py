"""The changes recorded in uncached runs, and the polynomial fitted to them."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest

from hydrarun.acceleration.cache.adaptive_gates import TeaCache
from hydrarun.acceleration.cache.base import NoCache
from hydrarun.acceleration.cache.recorder import RecordingCache
from hydrarun.config.compose import compose_config
from hydrarun.config.targets import instantiate
from hydrarun.core.errors import UsageError
from hydrarun.core.progress import Progress
from hydrarun.engine.calibration import teacache
from hydrarun.engine.calibration.teacache import fit_polynomials, list_warnings, measure_fit, plot_pairs
from hydrarun.engine.calibration.trial import TrialRunner
from tests.helpers import tiny

CURVE = [2000.0, -300.0, 10.0, 1.5, 0.01]  # rises on the range below
QUIET = Progress(quiet=True)


def points(count: int = 120, low: float = 0.01, high: float = 0.15, polynomial=CURVE, noise: float = 0.0) -> list:
    x = np.linspace(low, high, count)
    y = np.polyval(polynomial, x) + noise * np.random.default_rng(0).standard_normal(count)
    return list(zip(x.tolist(), y.tolist(), strict=True))


def said(pairs) -> list[str]:
    return list(list_warnings(pairs, fit_polynomials(pairs)))


def test_a_known_polynomial_comes_back_for_each_expert_from_all_its_branches():
    other = [0.0, 0.0, 3.0, 0.5, 0.0]
    both = points()
    pairs = {
        ("transformer", "positive"): both[::2],
        ("transformer", "negative"): both[1::2],
        ("transformer_2", "positive"): points(polynomial=other),
    }
    found = fit_polynomials(pairs)
    assert list(found) == ["transformer", "transformer_2"]
    assert np.allclose(found["transformer"], CURVE, rtol=1e-6)
    assert np.allclose(found["transformer_2"], other, atol=1e-6)


def test_quality():
    exact = measure_fit(points(), CURVE)
    assert (exact.correlation, exact.r_squared) == (pytest.approx(1), pytest.approx(1))
    shifted = measure_fit(points(), [*CURVE[:-1], CURVE[-1] + 1])
    assert shifted.correlation == pytest.approx(1)
    assert shifted.r_squared < -10
    flat = measure_fit([(0.1, 0.5), (0.2, 0.5)], CURVE)
    assert (flat.correlation, flat.r_squared) == (0, 0)


def test_a_good_fit_has_no_warnings():
    assert said({("transformer", "positive"): points()}) == []


def test_few_pairs():
    few = {("transformer", "positive"): points(99), ("transformer", "negative"): points(100)}
    assert said(few) == ["transformer, positive: 99 pairs; 100 or more make a fit that holds for other prompts"]


def test_no_relation():
    noise = np.random.default_rng(1).uniform(0.01, 1, (200, 2)).tolist()
    (line, *_) = said({("transformer", "negative"): noise})
    assert line.startswith("transformer, negative: correlation 0.")
    assert line.endswith("the signal barely predicts the output's change")


def test_a_polynomial_that_falls():
    # (x - 0.08)² + 0.01: falls on half of 0.01 to 0.15
    (line,) = said({("transformer", "positive"): points(polynomial=[1.0, -0.16, 0.0164])})
    assert line.startswith("transformer: the polynomial falls on 50% of its range")


def test_a_polynomial_that_leaves_the_data():
    # two clusters: the polynomial is not constrained between them
    gap = [*points(60, 0.010, 0.011, noise=1e-3), *points(60, 0.149, 0.150, noise=1e-3)]
    lines = said({("transformer", "positive"): gap})
    assert any("the polynomial runs from" in line and "its largest coefficient is" in line for line in lines)


def test_the_plot_has_a_panel_for_each_expert_with_its_own_pairs(tmp_path):
    pairs = {("transformer", "positive"): points(120), ("transformer_2", "positive"): points(7)}
    plot_pairs(tmp_path / "deep" / "plot.svg", pairs, fit_polynomials(pairs))
    text = (tmp_path / "deep" / "plot.svg").read_text(encoding="utf-8")
    assert [text.count(f">{words}<") for words in ("transformer", "transformer_2")] == [1, 1]
    assert [text.count(f"positive, {count} pairs") for count in (120, 7)] == [1, 1]


def by_hand(draws: TrialRunner, prompt: str) -> dict:
    """Compute the same pairs with hooks on the first block and on the whole transformer."""
    seen = defaultdict(list)
    handles = []
    for name, transformer in draws.parts.experts.transformers.items():
        signals = []
        first = next(transformer.all_blocks())

        def before(block, args, signals=signals):
            signals.append(block.modulated(args[2]).numpy().astype("float64"))

        def after(module, args, predictions, name=name, signals=signals):
            for branch, signal in zip(args[0].conditioning, signals, strict=True):
                seen[name, branch].append((signal, predictions[branch].numpy().astype("float64")))
            signals.clear()

        handles += [first.register_forward_pre_hook(before), transformer.register_forward_hook(after)]
    draws.denoise(draws.prepare(prompt), NoCache())
    for handle in handles:
        handle.remove()

    def distance(new, old):
        return np.abs(new - old).sum() / np.abs(old).sum()

    return {owner: [tuple(map(distance, new, old)) for old, new in pairwise(states)] for owner, states in seen.items()}


@pytest.mark.parametrize("subject", ["wan22_t2v_a14b"], indirect=True)
def test_what_is_recorded_is_what_hooks_see_of_each_branch_and_expert(subject):
    draws = TrialRunner(compose_config([*subject.overrides(), "sampling.num_inference_steps=9"]), QUIET)
    recording = RecordingCache()
    for prompt in ("a cat", "two dogs"):
        draws.denoise(draws.prepare(prompt), recording)
    expected = by_hand(draws, "a cat")
    for owner, pairs in by_hand(draws, "two dogs").items():
        expected[owner] += pairs
    assert set(recording.pairs) == {(e, b) for e in ("transformer", "transformer_2") for b in ("positive", "negative")}
    assert all(len(pairs) >= 2 for pairs in recording.pairs.values())
    for owner, pairs in recording.pairs.items():
        assert np.allclose(pairs, expected[owner], rtol=1e-5)
    assert not recording.last


def test_the_signal_is_what_teacache_compares(tiny_folder):
    draws = TrialRunner(tiny.config(tiny_folder, "sampling.num_inference_steps=6"), QUIET)
    recording = RecordingCache()
    draws.denoise(draws.prepare("a cat"), recording)
    node = tiny.config(tiny_folder, "cache=teacache", "cache.gate.threshold=0")["cache"]
    cache, compared = instantiate(node, "cache"), defaultdict(list)

    class Spy(TeaCache):
        def should_compute(self, step, changes):
            for branch, change in changes.items():
                compared[step.expert, branch].append(change)
            return super().should_compute(step, changes)

    cache.gate.__class__ = Spy
    draws.denoise(draws.prepare("a cat"), cache)
    assert {owner: [x for x, _ in pairs] for owner, pairs in recording.pairs.items()} == compared


def test_too_few_steps_are_refused_after_the_first_prompt(tiny_folder):
    draws = TrialRunner(tiny.config(tiny_folder, "sampling.num_inference_steps=2", "sampling.true_cfg_scale=1"), QUIET)
    drawn = []
    spied = SimpleNamespace(
        prepare=lambda prompt: drawn.append(prompt) or draws.prepare(prompt),
        denoise=draws.denoise,
        parts=draws.parts,
        progress=QUIET,
    )
    with pytest.raises(UsageError, match="transformer gives 4 pairs of consecutive steps, but a fit needs 5"):
        teacache.record_changes(spied, list("abcd"))
    assert drawn == ["a"]
    assert len(teacache.record_changes(spied, list("abcde"))["transformer", "positive"]) == 5
