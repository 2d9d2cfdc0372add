"""VAE patch parallel: every rank encodes and decodes its rows of the picture, without tiles or seams.

The result is that of the unsplit VAE. The feature maps inside encoder and decoder are split by rows, in the shares of
the latent rows: at a finer level a rank has the rows that its latent rows cover. Operations that read beyond a row get
the data from the other ranks: convolutions the neighbours' rows, `GroupNorm` the sums over all rows, attention the keys
and values of all rows. All other operations of a VAE are position-wise (other norms, activations, nearest upsampling,
patches) and are unchanged.

Bytes sent by one of n ranks, in elements of e bytes:
- halo, for a convolution over local `[N, C, F, h, W]` that reads `a` rows above and `b` below: `N C F W e (a + b)`; the
  first rank does not send `b`, the last does not send `a`; F includes the frames of a causal convolution's cache
  (3 x 3: a = b = 1; the encoders' stride-2 convolutions: a = 0, b = 1; 1 x 1: none);
- all_reduce, for a `GroupNorm` of G groups: `2 (n - 1) / n N G 24`;
- all_gather, for attention over N pictures or frames of width W and C channels with at most h rows per rank:
  `(n - 1) N h W 2 C e`; and for the output of encoder or decoder, `(n - 1) N C F h W e`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from hydrarun.core.distributed import collectives
from hydrarun.core.distributed.degrees import split_evenly
from hydrarun.core.distributed.mesh import Axis
from hydrarun.core.errors import UsageError

CONVOLUTIONS = (nn.Conv2d, nn.Conv3d)


def shard_vae(vae: nn.Module, axis: Axis) -> None:
    """Change a diffusers VAE in place so that each rank computes only its rows.

    `encode` and `decode`, called on every rank of `axis` with the same whole input, return the same whole output on
    every rank. Supports VAEs whose `encoder` and `decoder` consist of convolutions, `GroupNorm`, attention and
    position-wise operations. For inference: no gradients. Calls raise `UsageError` for fewer latent rows than ranks.

    Raises `UsageError` if tiling is on.
    """
    if getattr(vae, "use_tiling", False):
        raise UsageError(
            "vae.tiling=true does not go together with parallel.vae_degree > 1: each rank has only its rows of the "
            "picture already. Leave out one of the two."
        )
    for half in (vae.encoder, vae.decoder):
        convolutions = [module for module in half.modules() if isinstance(module, CONVOLUTIONS)]
        # only encoders have strides; decoders upsample
        factor = math.prod(convolution.stride[-2] for convolution in convolutions)
        half.forward = partial(_run_by_rows, half.forward, factor, axis)
        for convolution in convolutions:
            _replace_padding(convolution, axis)
        for module in half.modules():
            if isinstance(module, nn.GroupNorm):
                module.forward = partial(_group_norm, module, axis)


@torch.no_grad()
def _run_by_rows(
    forward: Callable[..., Tensor], factor: int, axis: Axis, x: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """Run `forward` on this rank's rows of the whole `x`, `[..., H, W]`, and gather the rows of all ranks.

    `factor`: rows of `x` per latent row.
    """
    parts = _split_rows(x.shape[-2], factor, axis.size)
    own = x.split([part * factor for part in parts], dim=-2)[axis.rank]
    with _GatherKeyValues(parts, axis):
        out = forward(own, *args, **kwargs)
    return _gather_rows(out, parts, axis)


def _split_rows(rows: int, factor: int, ranks: int) -> list[int]:
    """Return the number of latent rows of each rank."""
    latent, rest = divmod(rows, factor)
    if rest:
        raise UsageError(f"parallel.vae_degree: the VAE's encoder takes a multiple of {factor} rows, not {rows}.")
    if latent < ranks:
        raise UsageError(
            f"parallel.vae_degree={ranks} is more than the {latent} latent rows of this picture: choose a degree of at "
            f"most {latent}, or a larger sampling.height."
        )
    return split_evenly(latent, ranks)


def _gather_rows(x: Tensor, parts: Sequence[int], axis: Axis) -> Tensor:
    """Gather dim -2 of every rank's `x`: rows, or the tokens of whole rows. `parts`: latent rows of each rank."""
    scale = x.shape[-2] // parts[axis.rank]
    return collectives.all_gather(x, -2, [part * scale for part in parts], axis.group)


class _GatherKeyValues(TorchFunctionMode):
    """Gives attention calls inside the context the keys and values of all ranks; queries stay local.

    Attention is recognized by the function that it calls, not by its module: the classes differ between VAEs, but all
    have the tokens on dim -2, row by row.
    """

    def __init__(self, parts: Sequence[int], axis: Axis) -> None:
        super().__init__()
        self.parts, self.axis = parts, axis

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        query, key, value, *rest = args
        pair = _gather_rows(torch.cat([key, value], dim=-1), self.parts, self.axis)
        return func(query, *pair.split([key.shape[-1], value.shape[-1]], dim=-1), *rest, **kwargs)


def _replace_padding(convolution: nn.Module, axis: Axis) -> None:
    """Remove the zero padding of `convolution` above and below; a hook passes it the neighbours' rows instead."""
    kernel, stride = convolution.kernel_size[-2], convolution.stride[-2]
    if kernel == 1:
        return
    if hasattr(convolution, "_padding"):  # causal: pads explicitly, in the order of F.pad: width, height, frames
        left, right, above, _, *frames = convolution._padding
        convolution._padding = (left, right, 0, 0, *frames)
    else:
        *frames, above, width = convolution.padding
        convolution.padding = (*frames, 0, width)
    below = max(0, kernel - stride - above)  # the last output's window starts at `-stride - above` from this rank's end
    convolution.register_forward_pre_hook(partial(_add_halo_rows, above, below, axis))


def _add_halo_rows(above: int, below: int, axis: Axis, convolution: nn.Module, args: Any) -> Any:
    """Return the convolution's input, and a causal one's frame cache, with halo rows: `[..., above + h + below, W]`.

    The cache holds only this rank's rows, because it is stored before the halo is added.
    """
    parts = [part for part in args if part is not None]
    rows = parts[0].shape[-2]
    rows -= rows % convolution.stride[-2]  # a stride-2 convolution's input ends with its padding, a row of zeros
    own = [part[..., :rows, :] for part in parts]
    # one message for both, joined on dim -3: frames (or channels of pictures, which have no cache)
    first = torch.cat([part[..., :below, :] for part in own], dim=-3)
    last = torch.cat([part[..., rows - above :, :] for part in own], dim=-3)
    lengths = [part.shape[-3] for part in own]
    over, under = (halo.split(lengths, dim=-3) for halo in exchange_halo(first, last, axis))
    return tuple(torch.cat(whole, dim=-2) for whole in zip(over, own, under, strict=True))


@torch.compiler.disable
def exchange_halo(first: Tensor, last: Tensor, axis: Axis) -> tuple[Tensor, Tensor]:
    """Send `first` to the previous rank and `last` to the next; return what they send, shaped like `last` and `first`.

    Returns zeros where there is no such rank. The bytes are counted as `halo`.
    """
    outgoing = [first.contiguous(), last.contiguous()]
    incoming = [last.new_zeros(last.shape), first.new_zeros(first.shape)]
    operations = []
    for place, sent, received in zip((axis.rank - 1, axis.rank + 1), outgoing, incoming, strict=True):
        if 0 <= place < axis.size:
            other = dist.get_global_rank(axis.group, place)
            collectives.sent_bytes["halo"] += sent.nbytes
            operations += [dist.P2POp(dist.isend, sent, other, axis.group)] if sent.numel() else []
            operations += [dist.P2POp(dist.irecv, received, other, axis.group)] if received.numel() else []
    for work in dist.batch_isend_irecv(operations) if operations else []:
        work.wait()
    return incoming[0], incoming[1]


def _group_norm(norm: nn.GroupNorm, axis: Axis, x: Tensor) -> Tensor:
    """Apply `norm` to `[N, C, ...]` with the mean and variance over all ranks' rows."""
    groups = x.reshape(len(x), norm.num_groups, -1)
    variance, mean = (value.double() for value in torch.var_mean(groups.float(), dim=-1, correction=0))
    size = torch.full_like(mean, groups.shape[-1])
    sums = collectives.all_reduce(torch.stack([size, size * mean, size * (variance + mean**2)]), axis.group)
    mean = sums[1] / sums[0]
    variance = sums[2] / sums[0] - mean**2
    scale = (variance + norm.eps).rsqrt().repeat_interleave(norm.num_channels // norm.num_groups, dim=1)
    shift = -mean.repeat_interleave(norm.num_channels // norm.num_groups, dim=1) * scale
    if norm.affine:
        scale, shift = scale * norm.weight, shift * norm.weight + norm.bias
    shape = (*scale.shape, *[1] * (x.ndim - 2))
    scale, shift = (value.float().view(shape) for value in (scale, shift))
    # computed in float32, written in x's dtype: no float32 copy of a large map
    return torch.addcmul(shift, x, scale, out=torch.empty_like(x))
