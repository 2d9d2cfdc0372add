"""HSDP: each rank holds its share of the weights. test_models.py checks that the results stay the same."""

from __future__ import annotations

import pytest

from tests.helpers.ranks_work import held


@pytest.mark.sample(2)
@pytest.mark.parametrize("subject", ["wan22_t2v_a14b", "flux_dev"], indirect=True)
@pytest.mark.parametrize("ranks", [2, 4])
def test_bytes_held_are_one_nth(pool, subject, ranks):
    (blocks, texts), *_ = pool(2, held, subject.name, subject.folder, {})
    results = pool(ranks, held, subject.name, subject.folder, {"hsdp_degree": ranks})
    # shares are equal numbers of whole rows per rank; a tensor's rows are padded for that
    for own_blocks, own_texts in results:
        assert own_blocks == pytest.approx(blocks / ranks, rel=0.05)
        assert own_texts == pytest.approx(texts / ranks, rel=0.05)
    assert sum(own for own, _ in results) == blocks
    assert sum(own for _, own in results) == texts
