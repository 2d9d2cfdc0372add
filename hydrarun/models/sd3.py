"""Stable Diffusion 3.5 (https://arxiv.org/abs/2403.03206): dual-stream blocks. In Medium's first, images attend twice.

Reference: diffusers' `SD3Transformer2DModel`, whose checkpoints it loads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers.models.embeddings import CombinedTimestepTextProjEmbeddings
from torch import Tensor, nn

from hydrarun.core.errors import UsageError
from hydrarun.models.layers.attention import Attention
from hydrarun.models.layers.dual_stream import ContextStream, DualStreamBlock, TokenStream, map_dual_stream_weights
from hydrarun.models.layers.linear import QKVLinear, RowParallelLinear
from hydrarun.models.layers.norm import AdaLayerNorm, modulate
from hydrarun.models.layers.tensor_parallel import ShardSpec
from hydrarun.models.layers.tokens import Tokens
from hydrarun.models.transformer import Transformer


class SelfAttention(nn.Module):
    """Self-attention over the image tokens."""

    def __init__(self, dim: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.qkv = QKVLinear(dim, heads, head_dim)
        self.norm_q = nn.RMSNorm(head_dim, eps=1e-6)
        self.norm_k = nn.RMSNorm(head_dim, eps=1e-6)
        self.out = RowParallelLinear(dim, ShardSpec(heads, head_dim))
        self.attention = Attention()

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map `[B, S, D]` to `[B, S, D]`."""
        query, key, value = self.qkv(hidden_states)
        (attended,) = self.attention({"hidden_states": (self.norm_q(query), self.norm_k(key), value)})
        return self.out(attended)


class DualAttentionStream(TokenStream):
    """Image tokens with a second attention, over image tokens only, next to the joint attention."""

    parts = 9

    def __init__(self, dim: int, heads: int, head_dim: int) -> None:
        super().__init__(dim, heads, head_dim)
        self.second = SelfAttention(dim, heads, head_dim)

    def finish(self, hidden_states: Tensor, attended: Tensor, gates: Sequence[Tensor]) -> Tensor:
        """Add the outputs of both attentions and of the feed-forward to `[B, S, D]`."""
        *gates, shift, scale, gate = gates
        update = self.second(modulate(hidden_states, shift, scale))
        return super().finish(torch.addcmul(hidden_states, gate, update), attended, gates)


class LastTextStream(ContextStream):
    """The text stream of the last block."""

    def project(self, hidden_states: Tensor, rope: Tensor | None, shift: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        """Project as the base class does, but with the scale before the shift in the weights."""
        return super().project(hidden_states, rope, shift=scale, scale=shift)


class PatchEmbedding(nn.Module):
    """Embeds latents as tokens and adds position embeddings from a `side * side` table."""

    def __init__(self, channels: int, dim: int, patch_size: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.proj = nn.Conv2d(channels, dim, kernel_size=patch_size, stride=patch_size)
        self.pos_embed = nn.Parameter(torch.empty(1, side * side, dim))

    def forward(self, latents: Tensor) -> Tensor:
        """Map `[B, C, h, w]` to `[B, rows, columns, D]`, with positions from the middle of the table."""
        image = self.proj(latents).permute(0, 2, 3, 1)
        rows, columns = image.shape[1:3]
        top, left = (self.side - rows) // 2, (self.side - columns) // 2
        places = self.pos_embed.unflatten(1, (self.side, self.side))
        return (image + places[:, top : top + rows, left : left + columns]).contiguous()


class SD3Transformer(Transformer):
    """Arguments are the checkpoint's transformer/config.json.

    `dual_attention_layers` are the blocks in which image tokens attend twice. `sample_size` is not used: it determined
    the position table, which is in the checkpoint. Raises `UsageError` for Stable Diffusion 3, which does not norm
    queries and keys.
    """

    block_lists = ("blocks",)
    weight_map: ClassVar[Mapping[str, str | tuple[str, ...]]] = {
        **map_dual_stream_weights(
            modulation=("norm1.linear", "norm1_context.linear"), feed_forward=("ff", "ff_context")
        ),
        "blocks.*.image.second.qkv": tuple(f"transformer_blocks.*.attn2.{name}" for name in ("to_q", "to_k", "to_v")),
        "blocks.*.image.second.norm_q": "transformer_blocks.*.attn2.norm_q",
        "blocks.*.image.second.norm_k": "transformer_blocks.*.attn2.norm_k",
        "blocks.*.image.second.out": "transformer_blocks.*.attn2.to_out.0",
        "norm_out.modulation.linear": "norm_out.linear",
    }

    def __init__(
        self,
        sample_size: int = 128,
        patch_size: int = 2,
        in_channels: int = 16,
        out_channels: int | None = 16,
        num_layers: int = 24,
        attention_head_dim: int = 64,
        num_attention_heads: int = 24,
        joint_attention_dim: int = 4096,
        caption_projection_dim: int = 1536,
        pooled_projection_dim: int = 2048,
        pos_embed_max_size: int = 384,
        dual_attention_layers: Sequence[int] = tuple(range(13)),
        qk_norm: str | None = "rms_norm",
    ) -> None:
        super().__init__()
        if qk_norm != "rms_norm":
            raise UsageError(
                f"transformer/config.json: qk_norm={qk_norm}: only Stable Diffusion 3.5's rms_norm is supported"
            )
        self.patch_size = patch_size
        dim = num_attention_heads * attention_head_dim
        self.pos_embed = PatchEmbedding(in_channels, dim, patch_size, pos_embed_max_size)
        self.time_text_embed = CombinedTimestepTextProjEmbeddings(
            embedding_dim=dim, pooled_projection_dim=pooled_projection_dim
        )
        self.context_embedder = nn.Linear(joint_attention_dim, caption_projection_dim)
        self.blocks = nn.ModuleList(
            DualStreamBlock(
                dim,
                num_attention_heads,
                attention_head_dim,
                image=DualAttentionStream if index in dual_attention_layers else TokenStream,
                text=LastTextStream if index == num_layers - 1 else TokenStream,
            )
            for index in range(num_layers)
        )
        self.norm_out = AdaLayerNorm(dim)
        self.proj_out = nn.Linear(dim, patch_size * patch_size * (out_channels or in_channels))

    def embed(
        self, hidden_states: Tensor, timestep: Tensor, *, encoder_hidden_states: Tensor, pooled_projections: Tensor
    ) -> Tokens:
        """Embed latents `[B, C, 1, h, w]`, timesteps `[B]` in 0-1000, text `[B, T, E]` and pooled text `[B, P]`."""
        image = self.pos_embed(hidden_states.squeeze(2))
        return Tokens(
            image.flatten(1, 2),
            self.context_embedder(encoder_hidden_states),
            temb=self.make_temb(timestep, image.dtype, pooled_projections=pooled_projections),
            grid=(1, *image.shape[1:3]),
        )

    def make_temb(self, timestep: Tensor, dtype: torch.dtype, *, pooled_projections: Tensor, **_: Any) -> Tensor:
        """Map timesteps `[B]` and pooled prompt embeddings `[B, P]` to `[B, 1, D]`, in the dtype of the embeddings."""
        return self.time_text_embed(timestep, pooled_projections).unsqueeze(1)

    def head(self, tokens: Tokens) -> Tensor:
        """Map `[B, S, D]` to the velocity `[B, C, 1, h, w]`."""
        channels = self.proj_out(self.norm_out(tokens.hidden_states, tokens.temb))
        patches = channels.unflatten(-1, (self.patch_size, self.patch_size, -1)).unflatten(1, tokens.grid)
        # [B, 1, rows, columns, P, P, C]: put each patch back in its place
        return patches.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)
