"""The floating-point operations that bench/scaling.py counts, against formulas."""

from __future__ import annotations

import sys

import pytest

from tests.helpers.paths import ROOT

sys.path.append(str(ROOT / "bench"))

import scaling


@pytest.mark.parametrize("case", scaling.CASES, ids=lambda case: case.name)
def test_attention_takes_four_operations_per_pair_and_channel(case):
    """Query times key and scores times value, 2 each; Wan's cross-attention reads the text on top."""
    pairs = (case.tokens + case.text) ** 2 if case.spread else case.tokens**2 + case.tokens * case.text
    total, share = scaling.flops(case)
    assert total * share == pytest.approx(4 * pairs * case.dim * case.blocks, rel=1e-9)
