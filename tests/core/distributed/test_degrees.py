"""How many ranks a layout takes, and which layouts are invalid."""

from __future__ import annotations

import pytest

from hydrarun.core.distributed.degrees import find_degree_problems, split_evenly, world_size
from tests.helpers.parallel_runs import degrees
from tests.helpers.ranks_work import meshes_made_again


@pytest.mark.parametrize(
    ("chosen", "ranks"),
    [
        ({}, 1),
        ({"ulysses_degree": 4}, 4),
        ({"data_degree": 2, "cfg_degree": 2, "ring_degree": 2, "ulysses_degree": 2, "tensor_degree": 2}, 32),
        ({"hsdp_degree": 4}, 4),
        ({"hsdp_degree": 2, "ulysses_degree": 2}, 2),
        ({"hsdp_degree": 2, "tensor_degree": 2}, 4),
        ({"hsdp_degree": 2, "ulysses_degree": 4}, 4),
        ({"vae_degree": 2}, 2),
        ({"vae_degree": 2, "ulysses_degree": 4}, 4),
    ],
)
def test_world_size(chosen, ranks):
    assert world_size(degrees(**chosen)) == ranks
    assert not list(find_degree_problems(degrees(**chosen)))


@pytest.mark.parametrize(
    ("chosen", "key", "words"),
    [
        ({"ulysses_degree": 0}, "ulysses_degree", "0 is below 1"),
        ({"hsdp_degree": 10**5000}, "hsdp_degree", "above 65536"),
        ({"hsdp_degree": 3, "ulysses_degree": 2}, "hsdp_degree", "not a multiple of the 2 ranks of"),
        ({"hsdp_degree": 2, "ulysses_degree": 3}, "hsdp_degree", "3 ranks hold equal weights"),
        ({"vae_degree": 2, "ulysses_degree": 3}, "vae_degree", "3 ranks draw the same pictures"),
        ({"vae_degree": 4, "data_degree": 2, "ulysses_degree": 2}, "vae_degree", "2 ranks draw the same pictures"),
    ],
)
def test_what_cannot_be(chosen, key, words):
    (problem, *_) = find_degree_problems(degrees(**chosen))
    assert problem[0] == key
    assert words in problem[1]


def test_shares_differ_by_at_most_one():
    for length in range(12):
        for ranks in range(1, 6):
            parts = split_evenly(length, ranks)
            assert sum(parts) == length
            assert max(parts) - min(parts) <= 1
            assert parts == sorted(parts, reverse=True)


def test_a_layout_that_comes_again_brings_no_more_groups(pool):
    """A sweep builds the layouts of all its points in the same processes."""
    assert pool(2, meshes_made_again, 3) == [(True, 0)] * 2
