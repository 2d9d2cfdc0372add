"""Guidance against its formula."""

from __future__ import annotations

import pytest
import torch

from hydrarun.pipeline.guidance import ClassifierFreeGuidance, SkipLayerGuidance
from hydrarun.pipeline.state import State

PREDICTIONS = {"positive": torch.tensor([[[3.0, 4.0]]]), "negative": torch.tensor([[[1.0, 4.0]]])}


def request(true_cfg_scale: float | None = None, guidance_scale: float | None = None, second: float | None = None):
    return State(["a"], ["b"], [0], [], 8, 8, None, 1, true_cfg_scale, guidance_scale, second, None)


@pytest.mark.parametrize(("scale", "count"), [(0.0, 1), (1.0, 1), (1.001, 2), (4.0, 2)])
def test_branches(scale, count):
    assert ClassifierFreeGuidance().branches(request(scale)) == ("positive", "negative")[:count]
    by_other_field = ClassifierFreeGuidance(scale="guidance_scale")
    assert by_other_field.branches(request(None, scale)) == ("positive", "negative")[:count]


@pytest.mark.parametrize(("second", "low"), [(3.0, 3.0), (0.0, 0.0), (None, 5.0)])
def test_the_expert_for_low_noise_may_have_its_own_scale(second, low):
    guidance = ClassifierFreeGuidance(scale="guidance_scale", scale_2="guidance_scale_2")
    state = request(None, 5.0, second)
    assert guidance.scale_for(state, low_noise=False) == 5.0
    assert guidance.scale_for(state, low_noise=True) == low
    assert guidance.branches(state) == ("positive", "negative")


def test_without_a_scale_of_its_own_both_experts_share_one():
    guidance = ClassifierFreeGuidance(scale="guidance_scale")
    assert guidance.scale_for(request(None, 5.0, 3.0), low_noise=True) == 5.0


def test_extrapolation_away_from_the_negative_prompt():
    have = ClassifierFreeGuidance().combine(PREDICTIONS, 4.0)
    assert have.tolist() == [[[1 + 4 * (3 - 1), 4.0]]]


def test_rescaling_keeps_the_direction_and_takes_the_positive_norm():
    have = ClassifierFreeGuidance(rescale_norm=True).combine(PREDICTIONS, 4.0)
    assert have.norm().item() == pytest.approx(5.0)
    assert (have[0, 0, 0] / have[0, 0, 1]).item() == pytest.approx(9 / 4)


def test_rescaling_down_leaves_what_is_smaller():
    guidance = ClassifierFreeGuidance(rescale_norm="down")
    large = ClassifierFreeGuidance(rescale_norm=True).combine(PREDICTIONS, 4.0)
    assert guidance.combine(PREDICTIONS, 4.0).equal(large)
    small = {"positive": torch.tensor([[[3.0, 4.0]]]), "negative": torch.tensor([[[5.0, 4.0]]])}
    assert guidance.combine(small, 2.0).tolist() == [[[1.0, 4.0]]]


def test_one_branch_is_itself():
    positive = {"positive": PREDICTIONS["positive"]}
    assert ClassifierFreeGuidance(rescale_norm=True).combine(positive, 1.0) is positive["positive"]


def test_a_third_prediction_in_some_steps_of_a_guided_run():
    """As in diffusers' pipeline: the steps strictly between the two fractions."""
    guidance = SkipLayerGuidance(scale="guidance_scale", layers=[1], start=0.01, stop=0.2)
    state = request(None, 4.0)
    state.num_inference_steps = 40
    third = [index for index in range(40) if "fewer_blocks" in guidance.branches_at(state, index)]
    assert third == [1, 2, 3, 4, 5, 6, 7]
    assert guidance.branches_at(state, 1) == ("positive", "fewer_blocks", "negative")
    assert guidance.branches(state) == guidance.branches_at(state, 0) == ("positive", "negative")
    state.guidance_scale = 1.0
    assert guidance.branches_at(state, 1) == ("positive",)
    state.guidance_scale = 4.0
    assert SkipLayerGuidance(scale="guidance_scale").branches_at(state, 1) == ("positive", "negative")


def test_guiding_away_from_fewer_blocks():
    fewer = {**PREDICTIONS, "fewer_blocks": torch.tensor([[[2.5, 4.0]]])}
    assert SkipLayerGuidance(layers=[1], layers_scale=2.0).combine(fewer, 4.0).tolist() == [[[10.0, 4.0]]]
    assert SkipLayerGuidance(layers=[1], layers_scale=2.0).combine(PREDICTIONS, 4.0).tolist() == [[[9.0, 4.0]]]


def test_a_reference_that_counts_from_the_positive_prediction():
    """`positive + scale * (positive - negative)`, and 0 is no guidance."""
    guidance = ClassifierFreeGuidance(scale="guidance_scale", unguided=0.0)
    assert guidance.combine(PREDICTIONS, 4.0).tolist() == [[[3 + 4 * (3 - 1), 4.0]]]
    assert guidance.combine(PREDICTIONS, 0.0) is PREDICTIONS["positive"]
    assert guidance.branches(request(None, 0.0)) == ("positive",)
    assert guidance.branches(request(None, 0.5)) == ("positive", "negative")


def test_the_cap_is_on_each_items_norm_and_lets_smaller_ones_be():
    """Without the cap the first item's norm is 11.7; the cap is 1.5 x 5. The second item is below its cap."""
    predictions = {
        "positive": torch.tensor([[[3.0, 4.0]], [[1.0, 0.0]]]),
        "negative": torch.tensor([[[1.0, 4.0]], [[1.1, 0.0]]]),
    }
    have = ClassifierFreeGuidance(cfg_normalization=1.5).combine(predictions, 5.0)
    assert have[0].norm().item() == pytest.approx(7.5)
    assert (have[0, 0, 0] / have[0, 0, 1]).item() == pytest.approx(11 / 4)
    assert have[1].tolist() == [[pytest.approx(0.6), 0.0]]


def test_guidance_ends_on_the_way():
    guidance = ClassifierFreeGuidance(cfg_truncation=0.5)
    scales = [guidance.scale_for(request(4.0), low_noise=False, done=done) for done in (0.0, 0.5, 0.51)]
    assert scales == [4.0, 4.0, 1.0]
    both = ("positive", "negative")
    assert [guidance.needed(both, scale) for scale in (4.0, 1.0)] == [both, ("positive",)]
