"""A tiny random checkpoint of Z-Image, as diffusers' own pipeline."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

from tests.helpers import tiny
from tests.helpers.checkpoints_chat import qwen3

TEXT_WIDTH = 16
#: the template of Qwen for one user message
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def zimage(vae: AutoencoderKL) -> ZImagePipeline:
    """Build the pipeline, with the published scheduler of Z-Image-Turbo."""
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = TEMPLATE
    pipeline = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=False),
        vae=vae,
        text_encoder=qwen3(key_value_heads=2),
        tokenizer=tokenizer,
        transformer=transformer(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def transformer() -> ZImageTransformer2DModel:
    """Two refiners of each kind, as published, and 3 heads, which two ranks cannot split evenly."""
    torch.manual_seed(0)
    model = ZImageTransformer2DModel(
        in_channels=4,
        dim=48,
        n_layers=2,
        n_refiner_layers=2,
        n_heads=3,
        n_kv_heads=3,
        cap_feat_dim=TEXT_WIDTH,
        axes_dims=[4, 6, 6],
        axes_lens=[600, 32, 32],
    )
    return tiny.randomise(model, std=0.08)
