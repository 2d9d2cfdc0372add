"""Wan's own stages: a given first frame as latents, as extra channels, and kept through the steps."""

from __future__ import annotations

import torch
from torch import Tensor

from hydrarun.core.timing import Timings
from hydrarun.pipeline.stage import Components, Stage
from hydrarun.pipeline.state import State
from hydrarun.pipeline.vae import encode_pixels


class EncodeFirstFrame(Stage):
    """Encodes the given first frame to latents `[1, C, 1, h, w]`: it is the video's first frame and never gets noise.

    Without an input image the whole video is drawn. Reference: diffusers' `WanImageToVideoPipeline` with
    `expand_timesteps`.
    """

    needs = ("input_images", "height", "width")
    gives = ("first_frame",)
    phase = "encode"
    uses = ("vae",)

    def __call__(self, state: State, parts: Components, timings: Timings) -> None:
        if state.input_images:
            state.first_frame = encode_pixels(parts.pipeline, make_first_frame(state, parts))


class KeepFirstFrame(Stage):
    """Puts the given first frame into the finished latents."""

    needs = ("latents", "first_frame")
    gives = ("latents",)
    phase = "denoise"

    def __call__(self, state: State, parts: Components, timings: Timings) -> None:
        if state.first_frame is not None:
            first = state.first_frame.expand(len(state.latents), -1, -1, -1, -1)
            state.latents = torch.cat([first, state.latents[:, :, 1:]], dim=2)


class EncodeFirstFrameAsChannels(Stage):
    """Encodes the given first frame followed by grey frames to latents, after a mask that marks the given frames.

    Shape `[1, 4 + C, F, h, w]`: the mask has one channel for each video frame of a latent frame. Reference:
    diffusers' `WanImageToVideoPipeline.prepare_latents`.
    """

    needs = ("input_images", "height", "width", "num_frames")
    gives = ("condition_latents",)
    phase = "encode"
    uses = ("vae",)

    def __call__(self, state: State, parts: Components, timings: Timings) -> None:
        first = make_first_frame(state, parts)
        grey = first.new_zeros(1, 3, (state.num_frames or 1) - 1, state.height, state.width)
        latents = encode_pixels(parts.pipeline, torch.cat([first, grey], dim=2))
        mask = latents.new_zeros(1, parts.pipeline.vae_scale_factor_temporal, *latents.shape[2:])
        mask[:, :, 0] = 1
        state.condition_latents = torch.cat([mask, latents], dim=1)


def make_first_frame(state: State, parts: Components) -> Tensor:
    """Return the input image at the video's size, `[1, 3, 1, H, W]` from -1 to 1, float32."""
    pixels = parts.pipeline.video_processor.preprocess(state.input_images[0], height=state.height, width=state.width)
    return pixels.unsqueeze(2).to(parts.device, torch.float32)
