"""8-bit weights: their error, which weights are quantized, and which options are refused."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hydrarun.acceleration import quantization
from hydrarun.acceleration.parallel.hsdp import find_repeated_layers
from hydrarun.acceleration.quantization import TorchAO, count_stored_bytes
from hydrarun.config import targets
from hydrarun.config.compose import compose_config, compose_unchecked
from hydrarun.core.errors import UsageError
from hydrarun.engine.runner import Runner
from hydrarun.models.transformer import Transformer
from hydrarun.models.wan import WanTransformer
from tests.helpers import parallel_runs, subjects, tiny

CPU = torch.device("cpu")
#: limits of the RMS error of the latents after 2 steps, relative to the standard deviation of the plain run's; about
#: twice this tiny model's error. Every model: tests/test_matrix.py
TOLERANCES = {"int8_weight_only": 2e-2, "fp8_weight_only": 1e-1, "int8": 3e-2}
#: extra bytes per row: a float32 scale, and int8's zero point
PER_ROW = {"int8_weight_only": 5, "fp8_weight_only": 4, "int8": 5}
BOTH = "quantization.components=[transformer,text_encoder]"


def build(subject: subjects.Subject, *more: str) -> Runner:
    """Our runner on the subject's checkpoint, with more overrides; it shares the subject's image encoder."""
    runner = Runner(compose_config([*subject.overrides(), *more]))
    runner.built.parts.pipeline.vae.encode = subject.runner.built.parts.pipeline.vae.encode
    return runner


def latents(runner: Runner, **sampling: Any) -> torch.Tensor:
    """Return the final latents of a small run."""
    images = subjects.pictures(runner.config["model"]["input_images"][0], runner.config)
    return tiny.draw(runner, images, **{"num_inference_steps": 2, **sampling}).latents


def distance(ours: torch.Tensor, plain: torch.Tensor) -> float:
    return ((ours - plain).square().mean().sqrt() / plain.std()).item()


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return dict(module.named_parameters())


def is_quantized(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, "qdata")


def in_the_blocks(transformer: Transformer) -> set[str]:
    """Return the weights that should be quantized, by names and shapes alone."""
    return {
        name
        for name, weight in weights(transformer).items()
        if name.split(".")[0] in transformer.block_lists
        and name.endswith(".weight")
        and weight.ndim == 2
        and "modulation" not in name
    }


# --- the weights -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subject", subjects.SORTS, indirect=True)
def test_the_blocks_weights_and_nothing_else(subject):
    quantized = build(subject, "quantization=int8_weight_only")
    for ours, plain in zip(quantized.built.parts.experts, subject.runner.built.parts.experts, strict=True):
        expected, loaded = in_the_blocks(plain), weights(plain)
        assert {name for name, weight in weights(ours).items() if is_quantized(weight)} == expected
        assert len(expected) >= 4 * plain.depth
        for name, weight in weights(ours).items():
            if name not in expected:
                assert torch.equal(weight, loaded[name]), name
                assert weight.dtype == loaded[name].dtype
    encoders = [c for n, c in quantized.built.parts.pipeline.components.items() if n.startswith("text_encoder")]
    assert encoders
    assert not any(is_quantized(weight) for encoder in encoders for weight in encoder.parameters())


# --- the options -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", TOLERANCES)
@pytest.mark.parametrize("subject", ["flux_dev"], indirect=True)
def test_every_option_stays_near_and_repeats_bit_for_bit(subject, option):
    runner = build(subject, f"quantization={option}")
    ours = latents(runner)
    assert 0 < distance(ours, latents(subject.runner)) < TOLERANCES[option]
    assert torch.equal(latents(runner), ours)
    assert runner.collect_facts()["quantization"] == option


@pytest.mark.parametrize("option", PER_ROW)
@pytest.mark.parametrize("subject", ["qwen_image"], indirect=True)
def test_bytes_are_one_a_number_and_a_scale_a_row(subject, option):
    (ours,) = build(subject, f"quantization={option}").built.parts.experts
    for name in in_the_blocks(ours):
        weight = weights(ours)[name]
        rows, columns = weight.shape
        assert count_stored_bytes(weight) == rows * (columns + PER_ROW[option]), name
    (plain,) = subject.runner.built.parts.experts
    assert all(
        count_stored_bytes(weights(plain)[name]) == 4 * math.prod(weights(ours)[name].shape) for name in weights(ours)
    )


@pytest.mark.parametrize(("option", "step"), [("int8_weight_only", 1 / 254), ("fp8_weight_only", 1 / 16)])
def test_each_number_is_rounded_to_its_rows_nearest(option, step):
    """int8: within half of 1/127 of the row's largest. float8 has a 3-bit mantissa: within 1/16 of the number."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 32).requires_grad_(False)
    layer.weight.mul_(torch.logspace(-3, 3, 32)[:, None])  # rows of very different size
    before, bias = layer.weight.clone(), layer.bias.clone()
    quantizer(option).quantize(layer)
    largest = before.abs().amax(1, keepdim=True)
    bound = step * (largest if option.startswith("int8") else before.abs() + largest / 2**9)
    assert ((layer.weight.dequantize() - before).abs() <= bound * 1.001).all()
    assert not torch.equal(layer.weight.dequantize(), before)
    assert torch.equal(layer.bias, bias)


def test_eight_bit_activations_are_rounded_token_by_token():
    """Compared with the same arithmetic by hand; only scaling rounds. A tie may affect one of 10 tokens."""
    torch.manual_seed(1)
    layer, tokens = nn.Linear(32, 48).requires_grad_(False), torch.randn(2, 5, 32) * torch.logspace(-2, 2, 5)[:, None]
    made = quantizer("int8")
    made.quantize(layer)
    steps = 63.5 if made.config.reduce_range else 127.5  # reduced range on a CPU whose sums would overflow
    scale = tokens.abs().amax(-1, keepdim=True) / steps
    whole = (tokens / scale).round().clamp(-steps - 0.5, steps - 0.5)
    by_hand = (whole @ layer.weight.qdata.float().T) * scale * layer.weight.scale.flatten() + layer.bias
    off = (layer(tokens) - by_hand).abs()
    assert (off <= 128 * scale * layer.weight.scale.flatten()).all()
    assert (off <= 1e-5 * by_hand.abs().amax(-1, keepdim=True)).all(-1).sum() >= 9


@pytest.mark.parametrize("subject", ["flux_dev", "qwen_image_edit"], indirect=True)
def test_text_encoders_too(subject):
    """FLUX has two text encoders; that of the edit models also reads images."""
    runner = build(subject, "quantization=int8_weight_only", BOTH)
    encoders = {n: c for n, c in runner.built.parts.pipeline.components.items() if n.startswith("text_encoder")}
    assert len(encoders) == (2 if subject.name == "flux_dev" else 1)
    for key, encoder in encoders.items():
        plain = subject.runner.built.parts.pipeline.components[key]
        layers = {id(m) for part in find_repeated_layers(plain) for m in part.modules() if isinstance(m, nn.Linear)}
        for name, module in plain.named_modules():
            if isinstance(module, nn.Linear):
                assert is_quantized(encoder.get_submodule(name).weight) == (id(module) in layers), name
        assert layers
    assert 0 < distance(latents(runner), latents(subject.runner)) < 2 * TOLERANCES["int8_weight_only"]


@pytest.mark.parametrize("subject", ["qwen_image"], indirect=True)
def test_text_encoder_alone(subject):
    runner = build(subject, "quantization=int8_weight_only", "quantization.components=[text_encoder]")
    assert not any(is_quantized(weight) for (t,) in [runner.built.parts.experts] for weight in t.parameters())
    assert any(is_quantized(weight) for weight in runner.built.parts.pipeline.text_encoder.parameters())


@pytest.mark.parametrize("subject", ["wan22_t2v_a14b"], indirect=True)
@pytest.mark.parametrize("option", TOLERANCES)
def test_bfloat16_too(subject, option):
    """Compared with the plain bfloat16 run, so that rounding outside the blocks does not count."""
    plain, ours = (build(subject, "dtype=bfloat16", f"quantization={name}") for name in ("none", option))
    assert 0 < distance(latents(ours).float(), latents(plain).float()) < 2 * TOLERANCES[option]


def quantizer(option: str) -> TorchAO:
    made = targets.instantiate(compose_unchecked([f"quantization={option}"])[0]["quantization"], "quantization")
    made.prepare(CPU)
    return made


# --- how it is done --------------------------------------------------------------------------------------------------


def test_few_weights_at_a_time_are_there_in_full(tiny_folder, monkeypatch):
    """While a weight is quantized, the previous ones already are; each thread has read at most one of the next."""
    seen, original = [], TorchAO.quantize

    def watched(self, layer):
        blocks = ((n, w) for n, w in weights(watched.transformer).items() if n in in_the_blocks(watched.transformer))
        seen.append([n for n, w in blocks if w.device == CPU and not is_quantized(w)])
        original(self, layer)

    def loaded(self, transformer, name, original=TorchAO.loaded):
        watched.transformer = transformer
        original(self, transformer, name)

    monkeypatch.setattr(TorchAO, "quantize", watched)
    monkeypatch.setattr(TorchAO, "loaded", loaded)
    monkeypatch.setattr("hydrarun.core.threads.MAX_THREADS", 2)
    runner = Runner(tiny.config(tiny_folder, "quantization=int8_weight_only"))
    (transformer,) = runner.built.parts.experts
    assert len(seen) == len(in_the_blocks(transformer))
    assert {*map(len, seen)} <= {1, 2}


def test_it_is_said_what_was_done(tiny_folder, capsys):
    from hydrarun.core.progress import Progress

    runner = Runner(tiny.config(tiny_folder, "quantization=int8_weight_only"), Progress())
    (transformer,) = runner.built.parts.experts
    shapes = [weights(transformer)[name].shape for name in in_the_blocks(transformer)]
    before, after = (sum(bytes_of(*shape) for shape in shapes) / 2**20 for bytes_of in (full, in_int8))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("quantization=")]
    said = f"{len(shapes)} linear layers, {before:,.1f} MiB of weights are now {after:,.1f}"
    assert line == f"quantization=int8_weight_only: {said}"


def full(rows: int, columns: int) -> int:
    return 4 * rows * columns


def in_int8(rows: int, columns: int) -> int:
    return rows * (columns + 5)


@pytest.mark.parametrize(("sides", "stays"), [((20, 48), True), ((48, 20), True), ((48, 32), False)])
def test_sides_that_kernels_cannot_multiply_stay_as_they_are(sides, stays):
    made, layer = quantizer("int8"), nn.Linear(*sides).requires_grad_(False)
    made.quantize(layer)
    assert is_quantized(layer.weight) != stays
    assert ("; 1 layers stay as they are: their sides are no multiples of 16" in made.summary()) == stays
    weight_only, layer = quantizer("int8_weight_only"), nn.Linear(*sides).requires_grad_(False)
    weight_only.quantize(layer)
    assert is_quantized(layer.weight)


def test_a_model_names_what_it_keeps(tiny_folder, monkeypatch):
    from hydrarun.models.qwen_image import QwenImageTransformer

    monkeypatch.setattr(QwenImageTransformer, "keep_unquantized", ("modulation", "feed_forward"))
    (transformer,) = tiny.runner(tiny_folder, "quantization=int8_weight_only").built.parts.experts
    names = {name for name, weight in weights(transformer).items() if is_quantized(weight)}
    assert names == {name for name in in_the_blocks(transformer) if "feed_forward" not in name}
    assert names
    assert "modulation" in WanTransformer.keep_unquantized


def test_quantized_weights_move_with_their_module(tiny_folder):
    """As `offload=expert` moves them."""
    (transformer,) = tiny.runner(tiny_folder, "quantization=int8_weight_only").built.parts.experts
    name = min(in_the_blocks(transformer))
    weight = weights(transformer.to("meta"))[name]
    assert {weight.qdata.device.type, weight.scale.device.type, weight.device.type} == {"meta"}


@pytest.mark.parametrize("subject", ["flux_dev"], indirect=True)
def test_compiled_blocks_are_one_graph_and_compute_the_same(subject):
    """Only traced; flux_dev has blocks of two classes."""
    runner = build(subject, "quantization=int8_weight_only")
    eager = latents(runner)
    torch._dynamo.reset()
    for block in next(iter(runner.built.parts.experts)).all_blocks():
        block.compile(fullgraph=True, backend="eager", dynamic=False)
    assert distance(latents(runner), eager) < 1e-5


def latents_on_a_rank(name: str, folder: Path, chosen: dict[str, int], fields: dict[str, Any]) -> np.ndarray:
    """Return the final latents of this rank's own pictures."""
    composed = compose_config([*subjects.command(name, folder), "quantization=int8_weight_only"])
    runner = Runner({**composed, "parallel": parallel_runs.degrees(**chosen)})
    return latents(runner, **fields).numpy()


@pytest.mark.sample(1)
@pytest.mark.parametrize("layout", ["cfg", "ulysses", "ring", "data"])
@pytest.mark.parametrize("subject", ["qwen_image"], indirect=True)
def test_ranks_compute_the_same(pool, subject, layout):
    fields = {"true_cfg_scale": 3.0, "negative_prompt": subjects.LONG, "seed": [3, 4], "num_images_per_prompt": 2}
    alone = latents(build(subject, "quantization=int8_weight_only"), **fields).numpy()
    parts = pool(2, latents_on_a_rank, subject.name, subject.folder, {f"{layout}_degree": 2}, fields)
    found = np.concatenate(parts) if layout == "data" else parts[1]
    assert np.abs(found - alone).max() < 1e-4


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("node", "line"),
    [
        (
            {"weights": "int8", "activations": "float8"},
            "quantization.activations=float8: with weights=int8 it must be none or int8",
        ),
        ({"components": []}, "quantization.components=[]: list transformer or text_encoder, or both, each once"),
        (
            {"components": ["transformer", "transformer"]},
            "quantization.components=['transformer', 'transformer']: list transformer or text_encoder, or both, each"
            " once",
        ),
        ({"weights": "int4"}, "quantization.weights: 'int4' is not one of int8, float8."),
        (
            {"components": ["vae"]},
            "quantization.components: ['vae'] is not a list of one of transformer, text_encoder.",
        ),
    ],
)
def test_what_torchao_is_not_asked_for(node, line):
    option = compose_unchecked(["quantization=int8_weight_only"])[0]["quantization"]
    with pytest.raises(UsageError) as caught:
        targets.instantiate({**option, **node}, "quantization")
    assert str(caught.value) == line


def test_float8_products_are_refused_where_device_auto_is_the_cpu(tmp_path, monkeypatch):
    """Before the checkpoint folder, which is empty, is read."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config, _ = compose_unchecked(["model=demo", f"model.path={tmp_path}", "quantization=fp8"])
    with pytest.raises(UsageError) as caught:
        Runner(config)
    assert str(caught.value) == (
        "quantization=fp8 multiplies float8 numbers, which needs an NVIDIA GPU of compute capability 8.9 or more (Ada,"
        " Hopper, Blackwell), and device=cpu is not one. Use quantization=fp8_weight_only"
    )


@pytest.mark.parametrize(("capability", "can"), [((8, 0), False), ((8, 6), False), ((8, 9), True), ((9, 0), True)])
def test_which_gpus_multiply_float8(monkeypatch, capability, can):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert quantization.supports_float8(torch.device("cuda:1")) == can


def test_a_missing_torchao_is_named_with_the_command_that_brings_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torchao", None)
    config, _ = compose_unchecked(["model=demo", f"model.path={tmp_path}", "quantization=int8_weight_only"])
    with pytest.raises(UsageError, match=r"needs torchao, .* not installed here: pip install 'torchao>=0\.18'$"):
        Runner(config)
