"""Ovis-Image (https://github.com/AIDC-AI/Ovis-Image): FLUX.1's blocks, 6 and 27 of them, with gated feed-forwards.

Reference: diffusers' `OvisImageTransformer2DModel`, whose checkpoints it loads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from hydrarun.models.flux import StreamsTransformer, TimeEmbedding
from hydrarun.models.layers.tokens import Tokens


class OvisImageTransformer(StreamsTransformer):
    """Arguments are the checkpoint's transformer/config.json."""

    weight_map: ClassVar[Mapping[str, str | tuple[str, ...]]] = {
        **StreamsTransformer.weight_map,
        "time_embed": "timestep_embedder",
    }

    def __init__(
        self,
        patch_size: int = 1,
        in_channels: int = 64,
        out_channels: int | None = 64,
        num_layers: int = 6,
        num_single_layers: int = 27,
        attention_head_dim: int = 128,
        num_attention_heads: int = 24,
        joint_attention_dim: int = 2048,
        axes_dims_rope: Sequence[int] = (16, 56, 56),
    ) -> None:
        super().__init__(
            (num_layers, num_single_layers),
            (num_attention_heads, attention_head_dim),
            (in_channels, patch_size * patch_size * (out_channels or in_channels)),
            joint_attention_dim,
            axes_dims_rope,
            gated=True,
        )
        self.time_embed = TimeEmbedding(num_attention_heads * attention_head_dim)
        self.context_embedder_norm = nn.RMSNorm(joint_attention_dim, eps=1e-6)

    def embed(self, hidden_states: Tensor, timestep: Tensor, *, encoder_hidden_states: Tensor, **others: Any) -> Tokens:
        normed = self.context_embedder_norm(encoder_hidden_states)
        return super().embed(hidden_states, timestep, encoder_hidden_states=normed, **others)
