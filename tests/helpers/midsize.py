"""Random checkpoints with transformers of about ten million parameters, so that weights dominate the memory."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import QwenImageTransformer2DModel, SD3Transformer2DModel, WanTransformer3DModel

from tests.helpers import tiny

WIDE = {"attention_head_dim": 48, "num_attention_heads": 4}


def qwen_image() -> torch.nn.Module:
    return QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=6, joint_attention_dim=16, axes_dims_rope=(16, 16, 16), **WIDE
    )


def wan22_t2v_a14b() -> torch.nn.Module:
    return WanTransformer3DModel(
        in_channels=16,
        out_channels=16,
        text_dim=16,
        freq_dim=32,
        ffn_dim=512,
        num_layers=6,
        cross_attn_norm=True,
        **WIDE,
    )


def sd35_medium() -> torch.nn.Module:
    return SD3Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=6,
        joint_attention_dim=48,
        caption_projection_dim=192,
        pooled_projection_dim=40,
        sample_size=16,
        pos_embed_max_size=12,
        dual_attention_layers=(0, 1, 2),
        qk_norm="rms_norm",
        **WIDE,
    )


TRANSFORMERS = {"qwen_image": qwen_image, "sd35_medium": sd35_medium, "wan22_t2v_a14b": wan22_t2v_a14b}


def saved(name: str, folder: Path, into: Path) -> Path:
    """Write the tiny checkpoint of `folder` with wider transformers."""
    into.mkdir()
    for part in folder.iterdir():
        if part.name.startswith("transformer"):
            tiny.randomise(TRANSFORMERS[name](), std=0.02).save_pretrained(into / part.name)
        else:
            (into / part.name).symlink_to(part)
    return into
