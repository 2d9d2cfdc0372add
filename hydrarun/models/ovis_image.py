"""Ovis-Image (https://github.com/AIDC-AI/Ovis-Image): FLUX.1's blocks with gated feed-forwards.

There are 6 dual-stream and 27 single-stream blocks.
Reference: diffusers' `OvisImageTransformer2DModel`, whose checkpoints it loads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from hydrarun.models.flux import StreamsTransformer, TimeEmbedding
from hydrarun.models.layers.tokens import Tokens


@dataclass(eq=False, repr=False)
class OvisImageTransformer(StreamsTransformer):
    """Has gated feed-forwards and normalises the text before embedding it."""

    out_channels: int | None = 64
    num_layers: int = 6
    num_single_layers: int = 27
    joint_attention_dim: int = 2048

    weight_map: ClassVar[Mapping[str, str | tuple[str, ...]]] = {
        **StreamsTransformer.weight_map,
        "time_embed": "timestep_embedder",
    }
    gated = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.time_embed = TimeEmbedding(self.dim)
        self.context_embedder_norm = nn.RMSNorm(self.joint_attention_dim, eps=1e-6)

    def embed(self, hidden_states: Tensor, timestep: Tensor, *, encoder_hidden_states: Tensor, **others: Any) -> Tokens:
        normed = self.context_embedder_norm(encoder_hidden_states)
        return super().embed(hidden_states, timestep, encoder_hidden_states=normed, **others)
