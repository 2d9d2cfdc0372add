"""Tiny random checkpoints of the FLUX.1-like models whose text encoders are chat models."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    LongCatImageEditPipeline,
    LongCatImagePipeline,
    LongCatImageTransformer2DModel,
    OvisImagePipeline,
    OvisImageTransformer2DModel,
)
from transformers import Qwen2VLImageProcessorPil, Qwen2VLProcessor, Qwen3Config, Qwen3Model

from hydrarun.pipeline.processors import drop_video_processor
from tests.helpers import tiny

#: the shift by size of FLUX.1-dev
SCHEDULER = {"max_shift": 1.15, "shift": 3.0, "use_dynamic_shifting": True}
LATENTS = 16  # channels; hard-coded in LongCat's pipelines
#: the template of Qwen3 for one message, with and without thinking
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
#: sizes of the transformers: two blocks of each kind, 3 heads of 16, unequal rotary parts
SIZES: dict[str, Any] = {
    "patch_size": 1,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 3,
    "joint_attention_dim": 16,
    "axes_dims_rope": (4, 6, 6),
}


def longcat_image() -> LongCatImagePipeline:
    return _longcat(LongCatImagePipeline, tiny.kl_vae(LATENTS))


def longcat_image_edit() -> LongCatImageEditPipeline:
    """The VAE halves the size five times, because diffusers' pipeline always works on a megapixel."""
    return _longcat(LongCatImageEditPipeline, tiny.kl_vae(LATENTS, blocks=(4, 4, 4, 8, 8, 8)))


def _longcat(cls: type, vae: AutoencoderKL) -> Any:
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<|video_pad|>"], special_tokens=True)  # the processor counts these tokens too
    transformer = LongCatImageTransformer2DModel(in_channels=4 * LATENTS, pooled_projection_dim=16, **SIZES)
    pipeline = cls(
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER),
        vae=vae,
        text_encoder=tiny.text_encoder(),
        tokenizer=tokenizer,
        text_processor=drop_video_processor(Qwen2VLProcessor)(
            Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=56 * 56), tokenizer
        ),
        transformer=tiny.randomise(transformer, std=0.15),
    )
    pipeline.register_to_config(text_processor=("transformers", "Qwen2VLProcessor"))  # as in published model indices
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def ovis_image() -> OvisImagePipeline:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = CHAT
    torch.manual_seed(0)
    pipeline = OvisImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER),
        vae=tiny.kl_vae(4),
        text_encoder=qwen3(key_value_heads=1),
        tokenizer=tokenizer,
        transformer=tiny.randomise(OvisImageTransformer2DModel(in_channels=16, out_channels=16, **SIZES), std=0.11),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def qwen3(key_value_heads: int) -> Qwen3Model:
    """Two layers, 16 wide."""
    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=key_value_heads,
        head_dim=8,
        vocab_size=320,
        max_position_embeddings=1024,
    )
    return Qwen3Model(config).eval()
