"""Onload and offload: same values, tied weights stay tied, nothing is copied twice, memory is really freed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from hydrarun.acceleration.offload.module_mover import DiskOffloaded, HostOffloaded

MIB = 2**20


class Tied(nn.Module):
    """Two layers with one weight, as text encoders have them, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(8, 4), nn.Linear(4, 8, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.tensor([2.0, 3.0]))
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x)

    @property
    def kinds(self) -> list[str]:
        return [tensor.device.type for tensor in (self.embed.weight, self.head.weight, self.scale)]


def test_what_comes_to_the_device_leaves_as_it_was(fake):
    module = Tied()
    weight, scale = module.embed.weight, module.scale
    moving = HostOffloaded(module, torch.device("fake"))
    for _ in range(2):
        before = fake.memory_allocated()
        moving.onload()
        assert module.kinds == ["fake"] * 3
        assert module.head.weight is module.embed.weight
        assert fake.memory_allocated() - before == 4 * (8 * 4 + 2)  # a tied weight is copied once
        assert torch.equal(module.embed.weight.cpu(), weight)
        assert isinstance(module.embed.weight, nn.Parameter)
        moving.offload()
        assert fake.memory_allocated() == before
        assert module.embed.weight is module.head.weight is weight  # not a copy of the copy
        assert module.scale is scale


def test_what_was_put_in_on_the_device_moves_too(fake):
    module = Tied()
    moving = HostOffloaded(module, torch.device("fake"))
    moving.onload()
    module.scale = torch.tensor([5.0, 7.0], device="fake")
    moving.offload()
    assert module.kinds == ["cpu"] * 3
    assert module.scale.tolist() == [5.0, 7.0]


def test_coming_twice_and_going_twice_is_once(fake):
    module = Tied()
    moving = HostOffloaded(module, torch.device("fake"))
    moving.onload()
    there = module.scale
    moving.onload()
    assert module.scale is there
    moving.offload()
    moving.offload()
    assert module.kinds == ["cpu"] * 3


@pytest.mark.parametrize(("device", "pins"), [("cuda:1", 2), ("fake", 0)])
def test_only_a_gpu_wants_pinned_memory(fake, monkeypatch, device, pins):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor.clone())
    module = Tied()
    HostOffloaded(module, torch.device(device))
    assert len(pinned) == pins  # a tied weight once
    assert module.head.weight is module.embed.weight


def test_what_waits_on_disk_is_read_again():
    module, other = Tied(), Tied()
    moving = DiskOffloaded(module, lambda: other)
    moving.onload()
    assert module.embed.weight is not other.embed.weight  # the module was not offloaded yet
    moving.offload()
    assert module.kinds == ["meta"] * 3
    moving.onload()
    assert module.embed.weight is module.head.weight is other.embed.weight
    assert module.scale is other.scale


#: in its own process: memory that other tests have freed is not returned to the system at once
RESIDENT = """
import os, torch
from torch import nn
from hydrarun.acceleration.offload.module_mover import DiskOffloaded

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def read():
    return nn.ParameterList([torch.ones(64 * 2**20 // 4)])

moving = DiskOffloaded(read(), read)
full = resident()
moving.offload()
empty = resident()
moving.onload()
print(full - empty, resident() - empty)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from Linux's /proc")
def test_what_waits_on_disk_takes_no_memory():
    found = subprocess.run([sys.executable, "-c", RESIDENT], check=True, capture_output=True, text=True).stdout
    assert [int(word) for word in found.split()] == [pytest.approx(64 * MIB, abs=4 * MIB)] * 2


def test_a_compiled_module_stays_compiled():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    module = Tied()
    module.compile(fullgraph=True, backend=backend)
    moving = DiskOffloaded(module, Tied)
    results = []
    with torch.inference_mode():
        for _ in range(3):
            moving.onload()
            results.append(torch.equal(module(torch.eye(4)), module.embed.weight.T))
            moving.offload()
    assert results == [True] * 3
    assert len(graphs) == 1
