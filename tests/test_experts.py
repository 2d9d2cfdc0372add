"""Which transformer a step calls, and where the other one is."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hydrarun.experts import HIGH_NOISE, LOW_NOISE, Experts

CPU = torch.device("cpu")


class Recorded(nn.Module):
    """Remembers where it was put, without needing that place."""

    def __init__(self) -> None:
        super().__init__()
        self.places = ["cpu"]

    def to(self, place):
        self.places.append(str(place))
        return self


@pytest.mark.parametrize(
    ("timestep", "name"), [(999, HIGH_NOISE), (875, HIGH_NOISE), (874.9, LOW_NOISE), (0, LOW_NOISE)]
)
def test_the_boundary_belongs_to_the_first(timestep, name):
    assert Experts({}, 875.0, device=CPU).name_at(timestep) == name


def test_one_transformer_has_all_steps():
    assert {Experts({}, device=CPU).name_at(timestep) for timestep in (999, 1)} == {HIGH_NOISE}


def test_swapping_keeps_only_the_one_in_use_on_the_device():
    pair = {HIGH_NOISE: Recorded(), LOW_NOISE: Recorded()}
    experts = Experts(pair, 875.0, device=torch.device("cuda:1"), swap=True)
    for name in (HIGH_NOISE, HIGH_NOISE, LOW_NOISE, HIGH_NOISE):
        assert experts.ready(name) is pair[name]
        places = {other: module.places[-1] for other, module in pair.items()}
        assert places.pop(name) == "cuda:1"
        assert set(places.values()) == {"cpu"}


def test_the_other_leaves_before_the_next_comes():
    order = []

    class Ordered(Recorded):
        def to(self, place):
            order.append(str(place))
            return super().to(place)

    Experts({HIGH_NOISE: Ordered(), LOW_NOISE: Ordered()}, 1.0, device=torch.device("cuda"), swap=True).ready(LOW_NOISE)
    assert order == ["cpu", "cuda"]


def test_without_swapping_nothing_moves():
    pair = {HIGH_NOISE: Recorded(), LOW_NOISE: Recorded()}
    experts = Experts(pair, 875.0, device=torch.device("cuda"))
    experts.ready(LOW_NOISE)
    assert [module.places for module in pair.values()] == [["cpu"], ["cpu"]]
