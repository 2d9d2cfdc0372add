"""Branches on different ranks: each is predicted once, and every rank gets all of them."""

from __future__ import annotations

import math

import pytest

from tests.helpers.ranks_work import predictions


@pytest.mark.parametrize(("ranks", "count"), [(2, 2), (2, 3), (4, 3), (4, 4), (2, 1)])
def test_every_branch_is_predicted_once_and_reaches_every_rank(pool, ranks, count):
    branches = [f"branch {number}" for number in range(count)]
    results = pool(ranks, predictions, ranks, branches)
    for found, _, sent in results:
        assert list(found) == branches  # in the order in which guidance combines them
        assert list(found.values()) == list(range(count))
        assert sent == (ranks - 1) * math.ceil(count / ranks) * 2 * 5 * 3 * 4
    assert sum(asked for _, asked, _ in results) == count
