"""LongCat-Image (https://arxiv.org/abs/2512.07584): FLUX.1's blocks, 10 and 20 of them.

In the edit model the input image is more latent tokens, and the text encoder sees it too.
Reference: diffusers' `LongCatImageTransformer2DModel`, whose checkpoints it loads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from hydrarun.models.flux import StreamsTransformer, TimeEmbedding


class LongCatImageTransformer(StreamsTransformer):
    """Arguments are the checkpoint's transformer/config.json."""

    weight_map: ClassVar[Mapping[str, str | tuple[str, ...]]] = {
        **StreamsTransformer.weight_map,
        "time_embed": "time_embed.timestep_embedder",
    }
    pictures_follow_text = True

    def __init__(
        self,
        patch_size: int = 1,
        in_channels: int = 64,
        num_layers: int = 19,
        num_single_layers: int = 38,
        attention_head_dim: int = 128,
        num_attention_heads: int = 24,
        joint_attention_dim: int = 3584,
        axes_dims_rope: Sequence[int] = (16, 56, 56),
    ) -> None:
        super().__init__(
            (num_layers, num_single_layers),
            (num_attention_heads, attention_head_dim),
            (in_channels, patch_size * patch_size * in_channels),
            joint_attention_dim,
            axes_dims_rope,
        )
        self.time_embed = TimeEmbedding(num_attention_heads * attention_head_dim)
