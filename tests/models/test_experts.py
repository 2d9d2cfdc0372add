"""Which expert a step calls. Offloading of the other one: tests/acceleration/offload/test_strategies.py."""

from __future__ import annotations

import pytest

from hydrarun.models.experts import HIGH_NOISE, LOW_NOISE, Experts


@pytest.mark.parametrize(
    ("timestep", "name"), [(999, HIGH_NOISE), (875, HIGH_NOISE), (874.9, LOW_NOISE), (0, LOW_NOISE)]
)
def test_the_boundary_belongs_to_the_first(timestep, name):
    assert Experts({}, 875.0).name_at(timestep) == name


def test_one_transformer_has_all_steps():
    assert {Experts({}).name_at(timestep) for timestep in (999, 1)} == {HIGH_NOISE}
