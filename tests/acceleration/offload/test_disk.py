"""Blocks that are read from their files: `offload=disk`."""

from __future__ import annotations

import threading
import time
import weakref
from typing import Any

import numpy as np
import pytest
import torch

from hydrarun.acceleration.offload import layerwise
from hydrarun.acceleration.offload.layerwise import gather_rest
from hydrarun.acceleration.offload.strategies import DiskOffload
from hydrarun.core.errors import RunError
from hydrarun.models.weights import loader
from tests.helpers import tiny
from tests.helpers.subjects import SORTS
from tests.helpers.watched import draw, on_device, runner, size, steps, weights

TWO_EXPERTS = "wan22_t2v_a14b"
#: cache-dit treats all steps as similar and skips every step that it may skip
ALIKE = {"residual_diff_threshold": 1.0, "max_continuous_cached_steps": -1}


class Reading:
    """Records what `read_parameter` reads, and the most bytes of it that are alive at a time."""

    def __init__(self) -> None:
        self.fill = loader.read_parameter
        self.names: list[str] = []
        self.alive: dict[int, int] = {}
        self.most = 0

    def __call__(self, source: Any, *more: Any) -> torch.Tensor:
        tensor = self.fill(source, *more)
        self.names.append(source.name)
        self.alive[id(tensor)] = tensor.nbytes
        weakref.finalize(tensor, self.alive.pop, id(tensor))
        self.most = max(self.most, sum(list(self.alive.values())))
        return tensor


@pytest.mark.sample(2)
@pytest.mark.parametrize("subject", SORTS, indirect=True)
def test_blocks_come_from_their_files(subject, monkeypatch):
    """On the CPU: the plain run's latents, and never more than two blocks' weights alive."""
    plain = runner(subject, "cpu")
    loaded, read = Reading(), Reading()
    monkeypatch.setattr(loader, "read_parameter", loaded)
    monkeypatch.setattr(layerwise, "read_parameter", read)
    turned = runner(subject, "cpu", "disk")
    names = {name for name, _ in next(iter(plain.built.parts.experts)).named_parameters()}
    blocks = {name for name in names if name.startswith(next(iter(plain.built.parts.experts)).block_lists)}
    assert set(loaded.names) == names - blocks
    got = draw(turned, guided=True), draw(turned, guided=False)
    assert set(read.names) == blocks
    for have, guided in zip(got, (True, False), strict=True):
        assert torch.equal(have.latents, draw(plain, guided).latents)
    two = max(DiskOffload().blocks_bytes([*map(size, one.all_blocks())]) for one in plain.built.parts.experts)
    assert 0 < read.most <= two
    assert not read.alive  # the memory is free for decoding
    for transformer in turned.built.parts.experts:
        assert {w.device.type for block in transformer.all_blocks() for w in weights(block)} == {"meta"}


@pytest.mark.parametrize("subject", ["flux_dev"], indirect=True)
def test_from_files_to_the_device_no_more_than_two_blocks_come(deep, fake):
    plain, turned = runner(deep, "fake"), runner(deep, "fake", "disk")
    want = draw(plain)
    for _ in range(2):  # the text encoders are read again
        got = draw(turned)
        assert torch.equal(got.latents.cpu(), want.latents.cpu())
        assert np.array_equal(got.frames, want.frames)
    everything = sum(on_device(plain).values())
    sizes = [size(block) for block in next(iter(plain.built.parts.experts)).all_blocks()]
    around = sum(size(gather_rest(transformer, [])) for transformer in turned.built.parts.experts)
    held = around + size(turned.built.parts.pipeline.vae) + DiskOffload().blocks_bytes(sizes)
    both = zip(steps(turned, fake, True)[1], steps(plain, fake, True)[1], strict=True)
    for (_, _, most), (_, _, plain_most) in both:
        assert most <= held + plain_most - everything
    assert held < everything


def test_what_is_being_read_is_gone_once_it_is_let_go(tiny_folder, monkeypatch):
    turned = tiny.runner(tiny_folder, "offload=disk")
    reading, began = Reading(), threading.Event()

    def slow(*given: Any) -> torch.Tensor:
        began.set()
        time.sleep(0.002)
        return reading(*given)

    monkeypatch.setattr(layerwise, "read_parameter", slow)
    turns = turned.built.parts.offload.waiting["transformer"]
    turns.hold(0)
    began.wait(10)
    turns.let_go()
    assert reading.names
    assert not reading.alive


def test_a_file_that_breaks_meanwhile_is_named(tiny_folder, monkeypatch):
    turned = tiny.runner(tiny_folder, "offload=disk")

    def broken(header: Any, piece: Any, target: Any) -> None:
        raise RunError(f"{piece.source!r} cannot be read")

    with monkeypatch.context() as patched:
        patched.setattr(loader, "read_piece", broken)
        with pytest.raises(RunError, match="^'transformer_blocks.0.* cannot be read"):
            tiny.draw(turned)
    assert torch.equal(tiny.draw(turned).latents, tiny.draw(tiny.runner(tiny_folder)).latents)
