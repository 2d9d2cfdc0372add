"""Tensor parallelism: sharded results equal a single process'; a rank holds and sends the expected amounts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from hydrarun.core.distributed import collectives
from hydrarun.core.distributed.mesh import Axis
from hydrarun.core.errors import UsageError
from hydrarun.models.flux import FluxTransformer
from hydrarun.models.layers.linear import RowParallelLinear
from hydrarun.models.layers.norm import RMSNormAcrossHeads
from hydrarun.models.layers.tensor_parallel import ShardSpec, find_sharded_layers, shard_layers
from hydrarun.models.ovis_image import OvisImageTransformer
from hydrarun.models.qwen_image import QwenImageTransformer
from hydrarun.models.wan import WanTransformer
from tests.helpers import checkpoints, tiny
from tests.helpers.subjects import cases

TOLERANCE = 1e-5  # float32, sums in another order

CLASSES = {
    "flux_dev": FluxTransformer,
    "qwen_image": QwenImageTransformer,
    "qwen_image_edit_plus": QwenImageTransformer,
    "wan21_t2v_14b": WanTransformer,
    "wan22_ti2v_5b": WanTransformer,
}

#: `{ranks: heads}`, not divisible
HEADS = {2: 3, 4: 5}

#: one block of each kind at published widths
PUBLISHED = {
    "FLUX.1": (FluxTransformer, {"num_layers": 1, "num_single_layers": 1}),
    "Ovis-Image": (OvisImageTransformer, {"num_layers": 1, "num_single_layers": 1}),
    "Qwen-Image": (QwenImageTransformer, {"num_layers": 1}),
    "Wan 14B": (WanTransformer, {"num_layers": 1}),
    "Wan 5B": (WanTransformer, {"num_layers": 1, "num_attention_heads": 24, "ffn_dim": 14336}),
}


def load(cls: type, folder: Path, axis: Axis | None = None) -> Any:
    return tiny.load_transformer(cls, folder, axis=axis)


def on_meta(cls: type, arguments: dict[str, Any], axis: Axis | None = None) -> Any:
    with torch.device("meta"):
        transformer = cls(**arguments)
    if axis:
        shard_layers(transformer, axis)
    return transformer


def world() -> Axis:
    return Axis(dist.group.WORLD, dist.get_rank(), dist.get_world_size())


@torch.no_grad()
def predict(cls: type, folder: Path) -> tuple[np.ndarray, dict[str, int]]:
    """Run on a rank: load its shard and predict. Returns the prediction and the bytes sent."""
    transformer = load(cls, folder, world())
    collectives.sent_bytes.clear()
    predicted = tiny.predict(transformer, *torch.load(folder / "call.pt"))
    return predicted.numpy(), dict(collectives.sent_bytes)


@pytest.fixture
def folder(subject, ranks, tmp_path) -> Path:
    """A checkpoint whose heads and inner width do not divide by `ranks`, and a call of a real run on two prompts."""
    reference = subject.pipeline.transformer
    inner = {"ffn_dim": 66} if "ffn_dim" in reference.config else {}
    other = type(reference).from_config({**reference.config, "num_attention_heads": HEADS[ranks], **inner})
    tiny.randomise(other, std=0.15).save_pretrained(tmp_path)
    calls: list[Any] = []
    transformer = next(iter(subject.runner.built.parts.experts))
    hook = transformer.register_forward_pre_hook(lambda module, args: calls.append(args[0]))
    subject.draw(**{**cases(subject.name)["unequal prompts"], "num_inference_steps": 2})
    hook.remove()
    torch.save((calls[0].hidden_states, calls[0].timestep, calls[0].conditioning["positive"]), tmp_path / "call.pt")
    return tmp_path


def formula(transformer: Any, call: tuple[Any, ...], ranks: int) -> float:
    """Return the bytes that a rank sends in one float32 forward, by the formula in the module's docstring."""
    latents, timestep, conditioning = call
    tokens = transformer.embed(latents, timestep, **conditioning)
    batch, latent, width = tokens.hidden_states.shape
    text = tokens.encoder_hidden_states.shape[1]
    if isinstance(transformer, WanTransformer):
        reduced = len(transformer.blocks) * (3 * batch * latent * width * 4 + 4 * batch * (3 * latent + text))
    else:
        sums = 2 * len(transformer.blocks) + len(getattr(transformer, "single_blocks", ()))
        reduced = sums * batch * (latent + text) * width * 4
    return 2 * (ranks - 1) / ranks * reduced


@pytest.mark.sample(4)
@pytest.mark.parametrize("ranks", HEADS)
@pytest.mark.parametrize("subject", CLASSES, indirect=True)
@torch.no_grad()
def test_equals_one_process(subject, ranks, folder, pool):
    cls, call = CLASSES[subject.name], torch.load(folder / "call.pt")
    plain = load(cls, folder)
    want = tiny.predict(plain, *call)
    assert want.std() > 0.1
    for predicted, sent in pool(ranks, predict, cls, folder):
        assert (torch.from_numpy(predicted) - want).abs().max() <= TOLERANCE
        assert set(sent) == {"all_reduce"}
        assert sent["all_reduce"] == pytest.approx(formula(plain, call, ranks), rel=0.01)


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_rank_holds_its_part_of_every_matrix(name, ranks):
    cls, arguments = PUBLISHED[name]
    whole = dict(on_meta(cls, arguments).named_parameters())
    blocks = [n for n, p in whole.items() if n.split(".")[0] in cls.block_lists and p.ndim == 2]
    matrices = {n for n in blocks if "modulation" not in n}
    for rank in (0, ranks - 1):
        held = dict(on_meta(cls, arguments, Axis(None, rank, ranks)).named_parameters())
        share = sum(held[n].numel() for n in matrices) / sum(whole[n].numel() for n in matrices)
        assert share == pytest.approx(1 / ranks, rel=0.05)
        # otherwise, only vectors of sharded rows differ
        others = {n for n in held if held[n].shape != whole[n].shape} - matrices
        assert all(held[n].ndim == 1 and len(held[n]) == len(whole[n]) / ranks for n in others)


def test_the_columns_of_flux_single_blocks_are_heads_and_inner_width(tmp_path):
    """On 2 ranks, 3 heads of 16 are split into 2 and 1, and the inner width of 192 into halves."""
    checkpoints.BUILDERS["flux_dev"]().transformer.save_pretrained(tmp_path)
    whole = load(FluxTransformer, tmp_path).single_blocks[0].out
    for rank, (heads, inner) in enumerate([(slice(0, 32), slice(48, 144)), (slice(32, 48), slice(144, 240))]):
        out = load(FluxTransformer, tmp_path, Axis(None, rank, 2)).single_blocks[0].out
        assert torch.equal(out.weight, torch.cat([whole.weight[:, heads], whole.weight[:, inner]], dim=1))
        assert torch.equal(out.bias, whole.bias)


def test_more_ranks_than_heads():
    message = (
        "parallel.tensor_degree=4: the weights of QwenImageTransformer can be split across 3 ranks at most, because"
        " every head stays whole. Use parallel.tensor_degree=3 or less"
    )
    with pytest.raises(UsageError) as error:
        on_meta(QwenImageTransformer, {"num_layers": 1, "num_attention_heads": 3}, Axis(None, 0, 4))
    assert str(error.value) == message


def test_a_transformer_without_layers_to_share():
    with pytest.raises(UsageError, match="the weights of Linear can be split across 1 ranks at most"):
        shard_layers(torch.nn.Linear(2, 2), Axis(None, 0, 2))


@pytest.mark.parametrize("length", [5, 6, 7, 8])
def test_shares_follow_one_another(length):
    bounds = [ShardSpec(length, 16).share(Axis(None, rank, 3)) for rank in range(3)]
    assert [start for start, _ in bounds] == [0, *(stop for _, stop in bounds[:-1])]
    assert bounds[-1][1] == length * 16
    assert all(0 <= (stop - start) / 16 - length // 3 <= 1 for start, stop in bounds)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_an_axis_the_layers_are_the_plain_ones(dtype):
    """Results are bit-identical."""
    x = torch.randn(2, 7, 3, 8, dtype=dtype)
    norm, row = RMSNormAcrossHeads(3, 8).to(dtype), RowParallelLinear(5, ShardSpec(3, 8)).to(dtype)
    torch.nn.init.normal_(norm.weight)
    assert torch.equal(norm(x).flatten(2), F.rms_norm(x.flatten(2), (24,), norm.weight, 1e-6))
    assert torch.equal(row(x.flatten(2)), F.linear(x.flatten(2), row.weight, row.bias))
    assert len(list(find_sharded_layers(torch.nn.ModuleList([norm, row, torch.nn.Linear(1, 1)])))) == 2
