"""LongCat-Image (https://arxiv.org/abs/2512.07584): FLUX.1's blocks, 10 dual-stream and 20 single-stream.

In the edit model the input image is extra latent tokens and also an input of the text encoder.
Reference: diffusers' `LongCatImageTransformer2DModel`, whose checkpoints it loads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from hydrarun.models.flux import StreamsTransformer, TimeEmbedding


@dataclass(eq=False, repr=False)
class LongCatImageTransformer(StreamsTransformer):
    """Places pictures after the text, in rows and columns too."""

    joint_attention_dim: int = 3584

    weight_map: ClassVar[Mapping[str, str | tuple[str, ...]]] = {
        **StreamsTransformer.weight_map,
        "time_embed": "time_embed.timestep_embedder",
    }
    pictures_follow_text = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.time_embed = TimeEmbedding(self.dim)
