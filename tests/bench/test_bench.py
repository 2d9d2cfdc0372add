"""The benches on small shapes: rows are drawn and agree, cached rows compute what they say, the floor is counted."""

from __future__ import annotations

import sys
from functools import partial

import pytest
import torch
from torch import nn

from tests.helpers.paths import ROOT

sys.path.append(str(ROOT / "bench"))

import full_size
import gpu
import loop
import measuring
from shared_weights import own_bytes, quantized, twin

from hydrarun.acceleration.quantization import TorchAO

CPU = torch.device("cpu")
STEPS, BLOCKS, WIDTH = 4, 2, 256  # channels of two heads
TEXT = 3584  # of the published text encoder


def small(device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> full_size.Bench:
    """Two narrow blocks of the largest model, 64 x 64 pixels."""
    case = full_size.Case("qwen_image", 64, 64, text=8)
    return full_size.Bench(case, STEPS, device, dtype, blocks=BLOCKS, heads=2)


@pytest.fixture(scope="module")
def bench() -> full_size.Bench:
    return small()


@pytest.fixture
def traced(monkeypatch):
    """The classes of the blocks that are compiled: without the time that a code generator takes."""
    compiled: list[str] = []
    compile_in_place = nn.Module.compile

    def compile_block(block: nn.Module, fullgraph: bool, mode: str = "default", dynamic: bool = False) -> None:
        compiled.append(type(block).__name__)
        compile_in_place(block, backend="eager", fullgraph=fullgraph, dynamic=dynamic)

    monkeypatch.setattr(nn.Module, "compile", compile_block)
    return compiled


def test_rows_draw_what_diffusers_draws(bench, traced):
    loops = {name: partial(bench.draw, name) for name in full_size.ROWS}
    found, reasons = measuring.in_turns(loops, rounds=1, say=lambda _: None)
    assert set(reasons) == {"+fp8", "+compile +fp8", "+all"}
    assert all("needs an NVIDIA GPU of compute capability 8.9" in reason for reason in reasons.values())
    assert traced == ["QwenImageTransformerBlock"] * BLOCKS + ["DualStreamBlock"] * BLOCKS
    reference = found["diffusers"]
    assert reference[0].latents.std() > 0.5
    for name in ("diffusers compiled", "hydrarun", "+compile", "+tables"):
        # sums in another order, of latents of about 1.5, guided four times as far
        assert measuring.difference(found[name], reference) < 1e-4, name
    assert measuring.difference(found["+cache"], reference) > 1e-2
    assert all(len(drawn[0].steps) == STEPS for drawn in found.values())


def test_half_of_the_steps_are_computed(bench):
    bench.draw("+cache")
    record = bench.row("+cache").runs.cache.record()
    assert record["steps"]["transformer"]["positive"] == {"computed": [0, 2], "skipped": [1, 3]}
    assert record["blocks"] == {"run": 2 * 2 * BLOCKS, "all": 2 * STEPS * BLOCKS}
    assert 0 < bench.row("+cache").skipped[-1] < 1


def test_all_rows_share_one_set_of_weights(bench):
    ours = {p.untyped_storage().data_ptr() for p in bench.weights.parameters()}
    assert {p.untyped_storage().data_ptr() for p in bench.reference.parameters()} == ours
    assert own_bytes(bench.reference) == own_bytes(bench.weights)
    bench.draw("+tables")
    tables = bench.row("+tables").transformer
    assert {p.untyped_storage().data_ptr() for p in tables.parameters()} < ours
    modulation = 4 * (BLOCKS * 2 * 6 * WIDTH * (WIDTH + 1) + 2 * WIDTH * (WIDTH + 1))
    rows = 4 * STEPS * (BLOCKS * 2 * 6 * WIDTH + 2 * WIDTH)
    assert own_bytes(tables) == own_bytes(bench.weights) - modulation + rows


def test_eight_bits_leave_the_shared_weights_alone(bench):
    changed = quantized(bench.weights, TorchAO("float8", "none", ["transformer"]), CPU)
    linear = BLOCKS * 2 * 12 * WIDTH**2  # float32 to a byte each, and a scale for each row
    rows = BLOCKS * 2 * (3 + 1 + 4 + 1) * WIDTH
    assert own_bytes(changed) == own_bytes(bench.weights) - 3 * linear + 4 * rows
    assert own_bytes(twin(changed)) == own_bytes(changed)
    assert not any(hasattr(weight, "qdata") for weight in bench.weights.parameters())


def test_the_floor_counts_every_product(bench):
    latents, text, d = (64 // 16) ** 2, 8, WIDTH
    blocks = BLOCKS * ((latents + text) * 12 * d**2 + 2 * 6 * d**2)
    around = latents * 2 * 64 * d + text * TEXT * d + 256 * d + d**2 + 2 * d**2
    work = bench.work()
    assert work.linear_flops == 2 * 2 * (blocks + around)  # a multiplication and an addition; two branches
    assert work.attention_flops == 2 * BLOCKS * 4 * (latents + text) ** 2 * d


def test_the_peak_is_that_of_a_row_alone(fake):
    bench = small(torch.device("fake"))
    for name in ("hydrarun", "+tables"):
        bench.draw(name)
        weights = own_bytes(bench.row(name).transformer)
        # beside the weights: a few activations of 24 tokens, and what makes the tables when they are made
        assert weights < bench.row(name).peak < weights + 4 * 2**20
    bench.draw("+tables")
    assert bench.row("+tables").peak < own_bytes(bench.weights)


def test_the_table_says_what_is_missing(bench):
    table, said = gpu.measure(bench, ("diffusers", "hydrarun", "+fp8"), rounds=1, rate=1e12)
    assert [row[0] for row in table.rows] == ["diffusers", "hydrarun"]
    assert table.rows[0][3] == "1.000"
    assert table.rows[0][6] == "0.0e+00"
    assert "`+fp8` could not run: quantization=fp8 multiplies float8 numbers" in said
    assert table.title.startswith("qwen_image, 64 x 64, 8 tokens of text, branches positive, negative, 4 steps")


def test_a_table_goes_between_its_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("above\n<!-- bench: one -->\nold\n<!-- end -->\nbelow\n")
    measuring.keep(page, "bench: one", "new")
    assert page.read_text() == "above\n<!-- bench: one -->\nnew\n\n<!-- end -->\nbelow\n"
    with pytest.raises(SystemExit, match="has no <!-- bench: two --> with an <!-- end --> after it"):
        measuring.keep(page, "bench: two", "new")


def test_a_loop_is_compared_with_diffusers_in_its_dtype():
    loops = loop.Loops(["device=cpu", "sampling.num_inference_steps=2"])
    rows = ("plain", "diffusers", "bfloat16", "offload=model", "diffusers bfloat16")
    table, said = loop.measure(loops, rows, rounds=1)
    cells = {row[0]: row for row in table.rows}
    assert list(cells) == ["plain", "diffusers", "bfloat16", "diffusers bfloat16"]
    assert float(cells["plain"][4]) < 1e-5
    assert 1e-5 < float(cells["bfloat16"][4]) < 0.2
    assert [cells[name][3:] for name in ("diffusers", "diffusers bfloat16")] == [("1.000", "0.0e+00")] * 2
    assert said.startswith("`offload=model` could not run: offload: on device=cpu the host is the device")
