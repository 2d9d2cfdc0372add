"""Guidance against its formula."""

from __future__ import annotations

import pytest
import torch

from hydrarun.guidance import ClassifierFreeGuidance

PREDICTIONS = {"positive": torch.tensor([[[3.0, 4.0]]]), "negative": torch.tensor([[[1.0, 4.0]]])}


@pytest.mark.parametrize(("scale", "count"), [(0.0, 1), (1.0, 1), (1.001, 2), (4.0, 2)])
def test_branches(scale, count):
    assert ClassifierFreeGuidance().branches(scale) == ("positive", "negative")[:count]


def test_extrapolation_away_from_the_negative_prompt():
    have = ClassifierFreeGuidance().combine(PREDICTIONS, 4.0)
    assert have.tolist() == [[[1 + 4 * (3 - 1), 4.0]]]


def test_rescaling_keeps_the_direction_and_takes_the_positive_norm():
    have = ClassifierFreeGuidance(rescale_norm=True).combine(PREDICTIONS, 4.0)
    assert have.norm().item() == pytest.approx(5.0)
    assert (have[0, 0, 0] / have[0, 0, 1]).item() == pytest.approx(9 / 4)


def test_one_branch_is_itself():
    positive = {"positive": PREDICTIONS["positive"]}
    assert ClassifierFreeGuidance(rescale_norm=True).combine(positive, 1.0) is positive["positive"]
