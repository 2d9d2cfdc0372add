"""A block's weights in one flat buffer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hydrarun.acceleration.offload import layerwise
from hydrarun.acceleration.offload.module_mover import set_tensors
from hydrarun.acceleration.offload.packed_tensors import ALIGNMENT, PackedTensors, count_packed_bytes
from hydrarun.core.device import HOST

TWO_EXPERTS = "wan22_t2v_a14b"
#: cache-dit treats all steps as similar and skips every step that it may skip
ALIKE = {"residual_diff_threshold": 1.0, "max_continuous_cached_steps": -1}


def test_weights_are_packed_as_they_are():
    """With any dtypes and strides; a tied weight once."""
    module = nn.Module()
    numbers = torch.arange(48.0)
    module.first = nn.Parameter(numbers.view(6, 8).t(), requires_grad=False)
    module.second = nn.Parameter(numbers[:5].bfloat16(), requires_grad=False)
    module.tied = module.first
    module.register_buffer("third", torch.tensor(7))
    module.slice = nn.Parameter(numbers.view(6, 8)[:, 1:3], requires_grad=False)
    want = {name: (tensor.clone(), tensor.stride()) for name, tensor in module.state_dict().items()}
    packed = layerwise.pack_block(module, HOST)
    assert packed.bytes.nbytes == 4 * ALIGNMENT == count_packed_bytes(packed.tensors)
    there = packed.bytes.clone()
    for weights_ in (packed.tensors, packed.into(there)):
        set_tensors(module, weights_)
        for name, tensor in module.state_dict().items():
            assert torch.equal(tensor, want[name][0])
            assert tensor.stride() == want[name][1] or name == "slice"
        run = (packed.bytes if weights_ is packed.tensors else there).untyped_storage().data_ptr()
        assert {tensor.untyped_storage().data_ptr() for tensor in module.state_dict().values()} == {run}
        assert module.tied is module.first
        assert isinstance(module.first, nn.Parameter)


def test_memory_is_pinned_once_for_each_block(monkeypatch):
    pinned, empty = [], torch.empty

    def noting(*size: Any, pin_memory: bool = False, **more: Any) -> torch.Tensor:
        if pin_memory:
            pinned.append(size)
        return empty(*size, **more)

    monkeypatch.setattr(torch, "empty", noting)
    for device, count in (("cuda", 1), ("cpu", 0)):
        pinned.clear()
        packed = PackedTensors([torch.ones(3), torch.ones(200)], torch.device(device))
        packed.into(empty(2048, dtype=torch.uint8))
        assert pinned == [(2 * ALIGNMENT + ALIGNMENT,)] * count
