"""Converts between pixels and normalised latents, for every VAE: reads the scaling and the axes from its config.

Here latents are `[N, C, F, h, w]` and pixels `[N, 3, F, H, W]`; for a VAE of still pictures F is 1.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hydrarun.acceleration.parallel.vae import shard_vae
from hydrarun.config.checks.checkpoint import read_vae_factors
from hydrarun.core.distributed.mesh import Mesh
from hydrarun.core.errors import RunError


def encode_pixels(pipeline: Any, pixels: Tensor) -> Tensor:
    """Encode pixels from -1 to 1 to normalised latents: the mode of the VAE's distribution, as in the references."""
    vae = pipeline.vae
    pixels = pixels.to(vae.device, vae.dtype)
    encoded = vae.encode(pixels if has_frames(vae) else pixels.squeeze(2)).latent_dist.mode()
    latents = encoded if has_frames(vae) else encoded.unsqueeze(2)
    mean, std = read_latent_scaling(vae.config, latents)
    return (latents - mean) / std


def decode_latents(pipeline: Any, latents: Tensor) -> Tensor:
    """Decode normalised latents to pixels from about -1 to 1. Raises `RunError` for NaN and infinity."""
    vae = pipeline.vae
    latents = latents.to(vae.device, vae.dtype)
    mean, std = read_latent_scaling(vae.config, latents)
    # the reference divides by 1 / std: multiplying by std would round differently
    latents = latents / (1 / std) + mean
    if has_frames(vae):
        pixels = vae.decode(latents, return_dict=False)[0]
    else:
        pixels = vae.decode(latents.squeeze(2), return_dict=False)[0].unsqueeze(2)
    if not pixels.isfinite().all():
        raise RunError("the VAE decoded NaN or infinity: try vae.dtype=float32, or check the vae's weights")
    return pixels


def use_channels_last(vae: nn.Module) -> None:
    """Store the weights of convolutions in channels-last memory format; their outputs get it too."""
    for module in vae.modules():
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)
        elif isinstance(module, nn.Conv3d):
            module.to(memory_format=torch.channels_last_3d)


def run_single_frames_in_2d(vae: nn.Module) -> None:
    """Run causal convolutions as 2D convolutions on a single first frame.

    They would pad with zeros before it, so only their last temporal tap counts: the result is the same up to rounding.
    """
    for module in vae.modules():
        if isinstance(module, nn.Conv3d) and hasattr(module, "_padding"):  # diffusers' causal ones
            kind: Any = type(module)
            module.__class__ = make_single_frame_class(kind)  # a function on the module would keep it alive


@cache
def make_single_frame_class(causal: Any) -> Any:
    """Return a subclass of a causal convolution that computes single first frames in 2D."""

    class ForPicturesToo(causal):
        def forward(self, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
            """Convolve `[N, C, F, H, W]`; `cache_x`: the frames before."""
            *sides, before, _ = self._padding  # as F.pad takes them
            if cache_x is not None or x.shape[2] > 1 or before != self.kernel_size[0] - 1:
                return super().forward(x, cache_x)
            weight, stride = self.weight[:, :, -1], self.stride[1:]
            padded = functional.pad(x.squeeze(2), sides)
            return functional.conv2d(padded, weight, self.bias, stride).unsqueeze(2)

    return ForPicturesToo


def count_latent_channels(pipeline: Any) -> int:
    """Return the number of channels of the latents."""
    config = pipeline.vae.config
    return config["z_dim"] if "z_dim" in config else config["latent_channels"]


def has_frames(vae: Any) -> bool:
    """Return whether the VAE has an axis for frames."""
    return read_vae_factors(vae.config)[0] is not None


def read_latent_scaling(config: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the latents' mean and standard deviation, `[1, C, 1, 1, 1]` or one number for all channels.

    Raises `RunError` for a VAE whose config does not tell them.
    """
    means, deviations, factor = (config.get(name) for name in ("latents_mean", "latents_std", "scaling_factor"))
    channels = config.get("z_dim") or config.get("latent_channels")
    if means is not None and deviations is not None and len(means) == len(deviations) == channels:
        mean, std = torch.tensor(means), torch.tensor(deviations)
    elif means is None and factor:
        mean, std = torch.tensor([config.get("shift_factor") or 0.0]), torch.tensor([1 / factor])
    else:
        raise RunError(
            f"vae/config.json: needs latents_mean and latents_std, {channels} numbers each, or a scaling_factor above 0"
        )
    mean, std = (value.view(1, -1, 1, 1, 1).to(like.device, like.dtype) for value in (mean, std))
    return mean, std


def configure_vae(vae: Any, settings: dict[str, Any], mesh: Mesh | None) -> None:
    """Apply `settings`, the config section `vae`, and shard the VAE across ranks if `mesh` asks for it."""
    run_single_frames_in_2d(vae)
    if settings["slicing"]:
        vae.enable_slicing()
    if settings["tiling"]:
        vae.enable_tiling()
    if settings["channels_last"]:
        use_channels_last(vae)
    if mesh and mesh.vae:
        shard_vae(vae, mesh.vae)
