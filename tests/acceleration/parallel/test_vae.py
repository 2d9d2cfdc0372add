"""VAEs split by rows across gloo ranks: output of the unsplit VAE, each rank's share of rows, and bytes sent."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers import AutoencoderKLQwenImage
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from hydrarun.acceleration.parallel.vae import shard_vae
from hydrarun.core.distributed import collectives
from hydrarun.core.distributed.degrees import split_evenly
from hydrarun.core.distributed.mesh import Axis
from hydrarun.core.errors import UsageError
from tests.helpers import checkpoints

TOLERANCE = 3e-5  # outputs are of order 1; measured: at most 1.1e-5 (wan), 2e-7 (kl), from other orders of summation
WIDTH = 3  # of latents


def _qwen() -> nn.Module:
    sizes = {
        "base_dim": 4,
        "z_dim": 4,
        "dim_mult": [1, 2, 2],
        "num_res_blocks": 1,
        "temperal_downsample": [False, True],
    }
    return checkpoints._lively(AutoencoderKLQwenImage(**sizes))


VAES = {
    "kl": lambda: checkpoints._lively(checkpoints._flux_vae()),
    "qwen": _qwen,
    "wan": lambda: checkpoints._wan_vae(4),
    "wan_residual": checkpoints._wan22_vae,
}
#: pixels per latent, and channels of the latents
FACTORS = {"kl": 4, "qwen": 4, "wan": 8, "wan_residual": 16}
CHANNELS = {"kl": 4, "qwen": 4, "wan": 4, "wan_residual": 48}

CASES = [
    ("kl", 2, 5, 1, 2),
    ("kl", 4, 7, 1, 1),
    ("qwen", 2, 5, 1, 1),
    ("qwen", 4, 4, 1, 2),
    ("wan", 2, 5, 3, 1),
    ("wan", 4, 7, 3, 2),
    ("wan", 2, 4, 1, 1),
    ("wan_residual", 2, 5, 3, 1),
    ("wan_residual", 4, 7, 1, 1),
]


def latents(name: str, rows: int, frames: int, batch: int) -> Tensor:
    """`[N, C, h, w]` for pictures, `[N, C, F, h, w]` for VAEs with frames."""
    shape = (rows, WIDTH) if name == "kl" else (frames, rows, WIDTH)
    return torch.randn(batch, CHANNELS[name], *shape, generator=torch.Generator().manual_seed(1))


def pixels(name: str, rows: int, frames: int, batch: int) -> Tensor:
    """Pixels of such latents: four frames per latent frame, except one for the first."""
    height, width = rows * FACTORS[name], WIDTH * FACTORS[name]
    shape = (height, width) if name == "kl" else (4 * frames - 3, height, width)
    return torch.rand(batch, 3, *shape, generator=torch.Generator().manual_seed(2)) * 2 - 1


def run(vae: Any, way: str, x: Tensor) -> Tensor:
    with torch.inference_mode():
        return vae.decode(x, return_dict=False)[0] if way == "decode" else vae.encode(x).latent_dist.mode()


def axis() -> Axis:
    return Axis(dist.group.WORLD, dist.get_rank(), dist.get_world_size())


def largest_map(half: nn.Module) -> list[int]:
    """Return a list that later calls fill with the elements and rows of the largest map inside."""
    largest = [0, 0]

    def look(module: nn.Module, args: Any, out: Tensor) -> None:
        if out.ndim > 3 and out.numel() > largest[0]:
            largest[:] = [out.numel(), out.shape[-2]]

    for module in half.modules():
        if module is not half and not isinstance(module, nn.ZeroPad2d):  # the half's own output is the gathered one
            module.register_forward_hook(look)
    return largest


def split_run(name: str, way: str, x: Tensor) -> tuple[Tensor, int, dict[str, int]]:
    """On a rank: return the output, the rows of its largest map and the bytes it sent."""
    vae = VAES[name]()
    shard_vae(vae, axis())
    largest = largest_map(vae.decoder if way == "decode" else vae.encoder)
    collectives.sent_bytes.clear()
    out = run(vae, way, x)
    return out, largest[1], dict(collectives.sent_bytes)


def refused(name: str, way: str, x: Tensor) -> str:
    """On a rank: return the error message."""
    vae = VAES[name]()
    shard_vae(vae, axis())
    with pytest.raises(UsageError) as error:
        run(vae, way, x)
    return str(error.value)


def refused_tiling() -> str:
    """On a rank: return the error message."""
    vae = VAES["kl"]()
    vae.enable_tiling()
    with pytest.raises(UsageError) as error:
        shard_vae(vae, axis())
    return str(error.value)


def expected_bytes(name: str, way: str, x: Tensor, ranks: int) -> list[Counter[str]]:
    """Return each rank's bytes by the module docstring's formula, from the shapes in the unsplit VAE."""
    vae = VAES[name]()
    half = vae.decoder if way == "decode" else vae.encoder
    sent: list[Counter[str]] = [Counter() for _ in range(ranks)]
    others, parts = ranks - 1, split_evenly(x.shape[-2] // (FACTORS[name] if way == "encode" else 1), ranks)
    longest = max(parts) / sum(parts)

    def convolution(module: Any, args: Any) -> None:
        if module.kernel_size[-2] == 3:
            row = sum(part[..., 0, :].nbytes for part in args if part is not None)
            down, up = row, row if module.stride[-2] == 1 else 0  # to the rank above, which reads down; to that below
            for rank in range(ranks):
                sent[rank]["halo"] += down * (rank > 0) + up * (rank < others)

    def norm(module: Any, args: Any) -> None:
        for rank in range(ranks):
            sent[rank]["all_reduce"] += 2 * others * len(args[0]) * module.num_groups * 24 // ranks

    def gather(bytes_in_all: float) -> None:
        for rank in range(ranks):
            sent[rank]["all_gather"] += round(others * bytes_in_all * longest)

    for module in half.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            module.register_forward_pre_hook(convolution)
        if isinstance(module, nn.GroupNorm):
            module.register_forward_pre_hook(norm)
        if type(module).__name__.startswith("Attention") or type(module).__name__.endswith("AttentionBlock"):
            module.register_forward_pre_hook(lambda module, args: gather(2 * args[0].nbytes))
    half.register_forward_hook(lambda module, args, out: gather(out.nbytes))
    run(vae, way, x)
    return sent


@pytest.mark.sample(6)
@pytest.mark.parametrize("way", ["decode", "encode"])
@pytest.mark.parametrize(("name", "ranks", "rows", "frames", "batch"), CASES)
def test_equals_unsplit(pool, name, ranks, rows, frames, batch, way):
    x = (latents if way == "decode" else pixels)(name, rows, frames, batch)
    vae = VAES[name]()
    largest = largest_map(vae.decoder if way == "decode" else vae.encoder)
    wanted = run(vae, way, x)
    assert 0.1 < wanted.std() < 10
    expected = expected_bytes(name, way, x, ranks)
    results = pool(ranks, split_run, name, way, x)
    for rank, (out, map_rows, sent) in enumerate(results):
        assert out.shape == wanted.shape
        assert (out - wanted).abs().max() <= TOLERANCE
        assert torch.equal(out, results[0][0])
        assert map_rows * rows == largest[1] * split_evenly(rows, ranks)[rank]
        assert sent == pytest.approx(expected[rank], rel=0.01)


def test_seams_would_show(pool):
    """Without the neighbours' rows the difference is far beyond the tolerance."""
    x = latents("wan", 4, 1, 1)
    vae = VAES["wan"]()
    halves = torch.cat([run(vae, "decode", half) for half in x.split(2, dim=-2)], dim=-2)
    assert (halves - run(vae, "decode", x)).abs().max() > 1000 * TOLERANCE


def test_half_precision(pool):
    """Statistics are computed in float32: bfloat16 output is as close to float32's as that of the unsplit VAE."""
    x = latents("kl", 5, 1, 1)
    exact = run(VAES["kl"](), "decode", x)
    unsplit = run(VAES["kl"]().bfloat16(), "decode", x.bfloat16())
    for out in pool(2, split_in_bfloat16, x):
        assert out.dtype == torch.bfloat16
        assert (out - exact).abs().mean() <= 1.2 * (unsplit - exact).abs().mean()


def split_in_bfloat16(x: Tensor) -> Tensor:
    vae = VAES["kl"]().bfloat16()
    shard_vae(vae, axis())
    return run(vae, "decode", x.bfloat16())


@pytest.mark.parametrize("way", ["decode", "encode"])
def test_refuses_more_ranks_than_rows(pool, way):
    x = (latents if way == "decode" else pixels)("kl", 3, 1, 1)
    message = (
        "parallel.vae_degree=4 is more than the 3 latent rows of this picture: choose a degree of at most 3, or a "
        "larger sampling.height."
    )
    assert pool(4, refused, "kl", way, x) == [message] * 4


def test_refuses_rows_that_do_not_divide(pool):
    message = "parallel.vae_degree: the VAE's encoder takes a multiple of 4 rows, not 18."
    assert pool(2, refused, "kl", "encode", torch.zeros(1, 3, 18, 16)) == [message] * 2


def test_refuses_tiling(pool):
    message = (
        "vae.tiling=true does not go together with parallel.vae_degree > 1: each rank has only its rows of the picture "
        "already. Leave out one of the two."
    )
    assert pool(2, refused_tiling) == [message] * 2


def test_attention_is_split(pool):
    """Each rank computes only its own queries, with the keys of all ranks."""
    tokens = pool(2, attention_tokens, latents("kl", 5, 1, 1))
    assert tokens == [[(9, 15)], [(6, 15)]]


class Watch(TorchFunctionMode):
    """Records the numbers of query and key tokens of each attention call."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens: list[tuple[int, int]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is functional.scaled_dot_product_attention:
            self.tokens.append((args[0].shape[-2], args[1].shape[-2]))
        return func(*args, **(kwargs or {}))


def attention_tokens(x: Tensor) -> list[tuple[int, int]]:
    """On a rank: return the numbers of query and key tokens of each attention call."""
    vae = VAES["kl"]()
    shard_vae(vae, axis())
    with Watch() as watch:
        run(vae, "decode", x)
    return watch.tokens
