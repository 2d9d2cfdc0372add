"""FLUX.1 (https://github.com/black-forest-labs/flux): 19 dual-stream blocks, then 38 with the same weights for both.

Reference: diffusers' `FluxTransformer2DModel`, whose checkpoints it loads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, ClassVar

import torch
from diffusers.models.embeddings import CombinedTimestepGuidanceTextProjEmbeddings, CombinedTimestepTextProjEmbeddings
from torch import Tensor, nn
from torch.nn import functional as F

from hydrarun.layers.attention import Attention
from hydrarun.layers.dual_stream import DualStreamBlock, dual_stream_weights, within_float16
from hydrarun.layers.linear import ColumnLinear, QKVLinear, RowLinear
from hydrarun.layers.norm import AdaLayerNorm, Modulation, modulate
from hydrarun.layers.rope import frequencies, grid_frequencies, rotate
from hydrarun.parallel.tensor import Run
from hydrarun.transformer import Tokens, Transformer


class SingleStreamBlock(nn.Module):
    """The same weights for text and image; attention and feed-forward side by side, into one projection."""

    def __init__(self, dim: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.modulation = Modulation(dim, parts=3)
        self.qkv = QKVLinear(dim, heads, head_dim)
        self.norm_q = nn.RMSNorm(head_dim, eps=1e-6)
        self.norm_k = nn.RMSNorm(head_dim, eps=1e-6)
        self.up = ColumnLinear(dim, Run(4 * dim))
        self.out = RowLinear(dim, Run(heads, head_dim), Run(4 * dim))
        self.attention = Attention()

    def modulated(self, tokens: Tokens) -> Tensor:
        """The image tokens as the attention's projection sees them, `[B, S, D]`."""
        shift, scale, _ = self.modulation(tokens.temb)
        return modulate(tokens.hidden_states, shift, scale)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """`[B, S, D]` and `[B, T, D]` to the same."""
        lengths = [encoder_hidden_states.shape[1], hidden_states.shape[1]]
        joint = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        shift, scale, gate = self.modulation(tokens.temb)
        normed = modulate(joint, shift, scale)
        query, key, value = self.qkv(normed)
        rope = torch.cat([tokens.encoder_rope, tokens.rope])
        query, key = rotate(self.norm_q(query), rope), rotate(self.norm_k(key), rope)
        text, image = zip(*(x.split(lengths, dim=1) for x in (query, key, value)), strict=True)
        attended = torch.cat(self.attention({"encoder_hidden_states": text, "hidden_states": image}), dim=1)
        inner = F.gelu(self.up(normed), approximate="tanh")
        joint = torch.addcmul(joint, gate, self.out(torch.cat([attended, inner], dim=-1)))
        encoder_hidden_states, hidden_states = within_float16(joint).split(lengths, dim=1)
        return hidden_states, encoder_hidden_states


def single_stream_weights() -> dict[str, str | tuple[str, ...]]:
    """The weight map of `single_blocks.*`."""
    theirs = "single_transformer_blocks.*"
    return {
        "single_blocks.*.modulation.linear": f"{theirs}.norm.linear",
        "single_blocks.*.qkv": tuple(f"{theirs}.attn.{name}" for name in ("to_q", "to_k", "to_v")),
        "single_blocks.*.norm_q": f"{theirs}.attn.norm_q",
        "single_blocks.*.norm_k": f"{theirs}.attn.norm_k",
        "single_blocks.*.up": f"{theirs}.proj_mlp",
        "single_blocks.*.out": f"{theirs}.proj_out",
    }


class FluxTransformer(Transformer):
    """Arguments are the checkpoint's transformer/config.json."""

    block_lists = ("blocks", "single_blocks")
    weight_map: ClassVar[Mapping[str, str | tuple[str, ...]]] = {
        **dual_stream_weights(modulation=("norm1.linear", "norm1_context.linear"), feed_forward=("ff", "ff_context")),
        **single_stream_weights(),
        "norm_out.modulation.linear": "norm_out.linear",
    }

    def __init__(
        self,
        patch_size: int = 1,
        in_channels: int = 64,
        out_channels: int | None = None,
        num_layers: int = 19,
        num_single_layers: int = 38,
        attention_head_dim: int = 128,
        num_attention_heads: int = 24,
        joint_attention_dim: int = 4096,
        pooled_projection_dim: int = 768,
        guidance_embeds: bool = False,
        axes_dims_rope: Sequence[int] = (16, 56, 56),
    ) -> None:
        super().__init__()
        dim = num_attention_heads * attention_head_dim
        self.axes_dims_rope = tuple(axes_dims_rope)
        embeddings = (
            CombinedTimestepGuidanceTextProjEmbeddings if guidance_embeds else CombinedTimestepTextProjEmbeddings
        )
        self.time_text_embed = embeddings(embedding_dim=dim, pooled_projection_dim=pooled_projection_dim)
        self.context_embedder = nn.Linear(joint_attention_dim, dim)
        self.x_embedder = nn.Linear(in_channels, dim)
        shape = (dim, num_attention_heads, attention_head_dim)
        self.blocks = nn.ModuleList(DualStreamBlock(*shape) for _ in range(num_layers))
        self.single_blocks = nn.ModuleList(SingleStreamBlock(*shape) for _ in range(num_single_layers))
        self.norm_out = AdaLayerNorm(dim)
        self.proj_out = nn.Linear(dim, patch_size * patch_size * (out_channels or in_channels))

    def embed(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        *,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        guidance: Tensor | None,
        grid: tuple[int, int, int],
    ) -> Tokens:
        """Packed latents `[B, S, C]`, timesteps `[B]` in 0-1000, text `[B, T, E]` and its summary `[B, P]`.

        `guidance` `[B]` is the scale that a guidance-distilled checkpoint takes as input; None for others. `grid`
        counts the latent tokens: frames, rows, columns.
        """
        image = self.x_embedder(hidden_states)
        text = self.context_embedder(encoder_hidden_states)
        temb = self.make_temb(timestep, image.dtype, pooled_projections=pooled_projections, guidance=guidance)
        return Tokens(image, text, temb=temb, grid=grid)

    def positions(
        self, hidden_states: Tensor, *, encoder_hidden_states: Tensor, grid: tuple[int, int, int], **_: Any
    ) -> dict[str, Any]:
        text_length = encoder_hidden_states.shape[1]
        rope, text_rope = rope_tables(grid, text_length, self.axes_dims_rope, hidden_states.device)
        return {"rope": rope, "encoder_rope": text_rope}

    def make_temb(
        self,
        timestep: Tensor,
        dtype: torch.dtype,
        *,
        pooled_projections: Tensor,
        guidance: Tensor | None,
        **_: Any,
    ) -> Tensor:
        """Timesteps `[B]`, the prompts' summaries `[B, P]` and the scale `[B]` to `[B, 1, D]`."""
        # the reference divides by 1000 and multiplies again, in the latents' dtype: in bfloat16 that rounding shows
        times = [timestep.to(dtype) / 1000 * 1000]
        if guidance is not None:
            times.append(guidance.to(dtype) * 1000)
        return self.time_text_embed(*times, pooled_projections).unsqueeze(1)

    def head(self, tokens: Tokens) -> Tensor:
        """`[B, S, D]` to the velocity `[B, S, C]`."""
        return self.proj_out(self.norm_out(tokens.hidden_states, tokens.temb))


@lru_cache(maxsize=16)
def rope_tables(
    grid: tuple[int, int, int], text_length: int, axes_dims: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Rotations of the latent tokens `[F * H * W, d / 2, 2]`, counted from the corner, and of the text tokens: none."""
    axes = [
        frequencies(torch.arange(size), dim, precision=torch.float64) for size, dim in zip(grid, axes_dims, strict=True)
    ]
    still = frequencies(torch.zeros(text_length), sum(axes_dims))
    return grid_frequencies(axes).to(device), still.to(device)
