"""VAE memory formats, and single frames computed by 2D convolutions."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from hydrarun.pipeline.vae import configure_vae, count_latent_channels, decode_latents, encode_pixels

PLAIN = {"slicing": False, "tiling": False, "channels_last": False}
#: for pixels from -1 to 1: the same sums in another order
TOLERANCE = 1e-5
KINDS = ["flux_dev", "qwen_image", "wan22_t2v_a14b", "wan22_ti2v_5b"]


def arranged(subject, frames, **settings):
    """Return pixels and their latents, each of the VAE as it is and with `settings`; then the latter VAE."""
    pipeline = copy.copy(subject.pipeline)
    found = []
    for change in (None, {**PLAIN, **settings}):
        pipeline.vae = copy.deepcopy(subject.pipeline.vae)
        pipeline.vae.__dict__.pop("encode", None)  # the tests' own, which caches results
        if change:
            configure_vae(pipeline.vae, change, None)
        latents = torch.randn(
            2, count_latent_channels(pipeline), frames, 4, 6, generator=torch.Generator().manual_seed(0)
        )
        with torch.inference_mode():
            pixels = decode_latents(pipeline, latents)
            found.append((pixels, encode_pixels(pipeline, pixels)))
    return *zip(*found, strict=True), pipeline.vae


@pytest.mark.parametrize("subject", KINDS, indirect=True)
def test_channels_last_is_the_same_up_to_rounding(subject):
    """For each kind of VAE; every convolution has the channels-last format of its kind."""
    (plain, pixels), (want, latents), vae = arranged(subject, 1, channels_last=True)
    assert plain.std() > 1e-3
    assert (pixels - plain).abs().max() <= TOLERANCE
    assert (latents - want).abs().max() <= 10 * TOLERANCE
    formats = {nn.Conv2d: torch.channels_last, nn.Conv3d: torch.channels_last_3d}
    for kind, memory_format in formats.items():
        found = [module.weight for module in vae.modules() if isinstance(module, kind)]
        assert all(weight.is_contiguous(memory_format=memory_format) for weight in found)


@pytest.mark.parametrize("subject", KINDS, indirect=True)
def test_one_frame_in_2d_is_the_same_up_to_rounding(subject):
    """Also for the first of several frames; the others use 3D convolutions as before."""
    for frames in (1, 1 if subject.name == "flux_dev" else 3):
        (plain, pixels), (want, latents), _ = arranged(subject, frames)
        assert (pixels - plain).abs().max() <= TOLERANCE
        assert (latents - want).abs().max() <= 10 * TOLERANCE


@pytest.mark.parametrize("subject", ["qwen_image"], indirect=True)
def test_one_frame_goes_through_no_convolution_over_time(subject, monkeypatch):
    vae = copy.deepcopy(subject.pipeline.vae)
    configure_vae(vae, PLAIN, None)
    monkeypatch.setattr(nn.Conv3d, "_conv_forward", None)
    with torch.inference_mode():
        assert vae.decode(torch.zeros(1, count_latent_channels(subject.pipeline), 1, 4, 4)).sample.shape[2] == 1
