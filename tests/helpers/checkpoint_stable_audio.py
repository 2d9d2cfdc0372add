"""A tiny random checkpoint of Stable Audio Open, with small sizes and the published settings."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderOobleck,
    CosineDPMSolverMultistepScheduler,
    StableAudioDiTModel,
    StableAudioPipeline,
    StableAudioProjectionModel,
)

from tests.helpers import tiny

LATENTS, CHANNELS = 24, 4
#: width of the projected text and seconds; differs from the width of the text encoder
CONTEXT = 24


def stable_audio(text_encoder: Any, tokenizer: Any, width: int) -> StableAudioPipeline:
    """Build the pipeline: 8 samples per latent at 4 samples/s are 48 s of stereo, about as published.

    The tokenizer pads every prompt.
    """
    tokenizer.model_max_length = 64
    pipeline = StableAudioPipeline(
        vae=_vae(),
        text_encoder=text_encoder,
        projection_model=tiny.randomise(_projection(width), std=0.3),
        tokenizer=tokenizer,
        transformer=tiny.randomise(_transformer(), std=0.11),
        scheduler=CosineDPMSolverMultistepScheduler(
            sigma_min=0.3,
            sigma_max=500,
            sigma_data=1.0,
            sigma_schedule="exponential",
            solver_order=2,
            prediction_type="v_prediction",
        ),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _projection(width: int) -> StableAudioProjectionModel:
    return StableAudioProjectionModel(text_encoder_dim=width, conditioning_dim=CONTEXT, min_value=0, max_value=512)


def _transformer() -> StableAudioDiTModel:
    """Two heads share a key and value head, as published. Two ranks split the three groups unequally."""
    torch.manual_seed(0)
    return StableAudioDiTModel(
        sample_size=LATENTS,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=6,
        num_key_value_attention_heads=3,
        cross_attention_dim=3 * 8,
        time_proj_dim=16,
        global_states_input_dim=2 * CONTEXT,
        cross_attention_input_dim=CONTEXT,
    )


def _vae() -> AutoencoderOobleck:
    torch.manual_seed(0)
    vae = AutoencoderOobleck(
        encoder_hidden_size=2 * CHANNELS,
        downsampling_ratios=[2, 4],
        channel_multiples=[1, 2],
        decoder_channels=8,
        decoder_input_channels=CHANNELS,
        audio_channels=2,
        sampling_rate=4,
    )
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
            if name == "decoder.conv2.weight_g":
                parameter *= 0.5  # keeps most samples below full scale
    return vae.eval()
