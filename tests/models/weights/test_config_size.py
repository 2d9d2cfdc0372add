"""A config.json that asks for another size of model than the weights have is refused before it is built."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from hydrarun.core.errors import RunError, UsageError
from hydrarun.models.weights.config_size import (
    MAX_COUNT,
    SPARE_ELEMENTS,
    build_on_meta,
    check_counts,
    check_module_fit,
)
from hydrarun.models.weights.safetensors import Checkpoint


@pytest.mark.parametrize(
    "config",
    [
        {"num_layers": 10**9},
        {"n_layers": 10**9},
        {"num_hidden_layers": 1001},
        {"num_res_blocks": 10**9},
        {"text_config": {"vision": [{"depth": 10**9}]}},
        {"depths": [1, 10**9]},
        {"num_local_experts": 10**30},
    ],
    ids=str,
)
def test_counts_that_no_weights_have(config):
    with pytest.raises(RunError, match=r"^x: [a-z_]+: 1\d+, and "):
        check_counts("x", config)
    with pytest.raises(RunError, match=r"^x: [a-z_]+: 1\d+, and the weights hold 700 tensors$"):
        check_counts("x", config, 700)


def test_counts_that_weights_have():
    check_counts("x", {"num_layers": MAX_COUNT, "vocab_size": 10**6, "rope_theta": 10**9, "layer_types": ["full"]})
    check_counts("x", {"num_layers": 1500}, 1500)


def test_a_constructor_without_end_is_stopped():
    def build() -> nn.Module:
        return nn.ModuleList([nn.Linear(1, 1) for _ in range(10**9)])

    with pytest.raises(RunError, match="^x: asks for more than 100 parameters"):
        build_on_meta("x", build, 100)
    assert len(list(build_on_meta("x", lambda: nn.Linear(10**6, 10**6), 2).parameters())) == 2
    nn.ModuleList([nn.Linear(1, 1) for _ in range(100)])  # no limit outside


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Linear(10**18, 10**18),
        lambda: nn.Linear(-1, 2),
        lambda: nn.Linear("1", 2),
        lambda: nn.GroupNorm(3, 4),
        lambda: 1 / 0,
        lambda: [][0],
        lambda: None.x,
    ],
)
def test_what_constructors_raise_is_one_line(build):
    with pytest.raises(RunError, match=r"^x: no model can be built with these values: ") as caught:
        build_on_meta("x", build)
    assert "\n" not in str(caught.value)


def test_a_size_of_zero(recwarn):
    with pytest.raises(RunError, match="^x: asks for no numbers in weight$"):
        build_on_meta("x", lambda: nn.Linear(0, 3))
    assert not recwarn.list


def test_refusals_of_our_own_stay():
    def build() -> nn.Module:
        raise UsageError("not this variant")

    with pytest.raises(UsageError, match="^not this variant$"):
        build_on_meta("x", build)


def checkpoint(folder, tensors) -> Checkpoint:
    save_file(tensors, folder / "model.safetensors")
    return Checkpoint(folder, "model")


def test_a_module_larger_than_its_weights(tmp_path):
    held = checkpoint(tmp_path, {"weight": torch.zeros(4, 4), "bias": torch.zeros(4)})
    check_module_fit("x", nn.Linear(4, 4), held)
    module = build_on_meta("x", lambda: nn.Linear(SPARE_ELEMENTS, 2))
    with pytest.raises(RunError, match=rf"^x: asks for {2 * SPARE_ELEMENTS + 2} numbers, and the weights hold 20$"):
        check_module_fit("x", module, held)
    table = nn.Linear(4, 4)
    table.register_buffer("places", torch.empty(10**9, device="meta"))
    with pytest.raises(RunError, match=r"^x: asks for 1000000020 numbers"):
        check_module_fit("x", table, held)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool])
def test_integers_in_the_place_of_weights(tmp_path, dtype):
    held = checkpoint(tmp_path, {"a.weight": torch.zeros(4, 4).to(dtype), "a.bias": torch.zeros(4)})
    with pytest.raises(RunError, match=r"model.safetensors: 'a.weight' has the dtype .* not quantized"):
        check_module_fit("x", nn.Linear(4, 4), held)
    held = checkpoint(tmp_path, {"weight": torch.zeros(4, 4), "position_ids": torch.zeros(4).to(dtype)})
    check_module_fit("x", nn.Linear(4, 4), held)
