"""Qwen-Image (https://arxiv.org/abs/2508.02324): 60 dual-stream blocks with joint attention over text and image.

Reference: diffusers' `QwenImageTransformer2DModel`, whose checkpoints it loads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import ClassVar

import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor, nn

from hydrarun.errors import UsageError
from hydrarun.layers.attention import Attention
from hydrarun.layers.linear import FeedForward, QKVLinear
from hydrarun.layers.norm import AdaLayerNorm, Modulation, modulate
from hydrarun.layers.rope import frequencies, rotate
from hydrarun.transformer import Tokens, Transformer

FLOAT16_MAX = torch.finfo(torch.float16).max


class Stream(nn.Module):
    """One stream's share of a block: what happens to its tokens before and after the joint attention."""

    def __init__(self, dim: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.modulation = Modulation(dim, parts=6)
        self.qkv = QKVLinear(dim, heads, head_dim)
        self.norm_q = nn.RMSNorm(head_dim, eps=1e-6)
        self.norm_k = nn.RMSNorm(head_dim, eps=1e-6)
        self.out = nn.Linear(heads * head_dim, dim)
        self.feed_forward = FeedForward(dim)

    def project(self, hidden_states: Tensor, rope: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        """`[B, S, D]` to query, key and value `[B, S, H, d]`, normed and rotated."""
        query, key, value = self.qkv(modulate(hidden_states, shift, scale))
        return rotate(self.norm_q(query), rope), rotate(self.norm_k(key), rope), value

    def finish(self, hidden_states: Tensor, attended: Tensor, gates: Sequence[Tensor]) -> Tensor:
        """Add the attention's and the feed-forward's output to `[B, S, D]`."""
        gate_attention, shift, scale, gate_feed_forward = gates
        hidden_states = torch.addcmul(hidden_states, gate_attention, self.out(attended))
        update = self.feed_forward(modulate(hidden_states, shift, scale))
        hidden_states = torch.addcmul(hidden_states, gate_feed_forward, update)
        if hidden_states.dtype == torch.float16:  # later blocks' activations leave its range
            hidden_states = hidden_states.clip(-FLOAT16_MAX, FLOAT16_MAX)
        return hidden_states


class DualStreamBlock(nn.Module):
    """Text and image tokens with weights of their own, joined in attention."""

    def __init__(self, dim: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.image = Stream(dim, heads, head_dim)
        self.text = Stream(dim, heads, head_dim)
        self.attention = Attention()

    def modulated(self, tokens: Tokens) -> Tensor:
        """The image tokens as the attention's projection sees them, `[B, S, D]`."""
        shift, scale, *_ = self.image.modulation(tokens.temb)
        return modulate(tokens.hidden_states, shift, scale)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """`[B, S, D]` and `[B, T, D]` to the same."""
        shift, scale, *image_gates = self.image.modulation(tokens.temb)
        image = self.image.project(hidden_states, tokens.rope, shift, scale)
        shift, scale, *text_gates = self.text.modulation(tokens.temb)
        text = self.text.project(encoder_hidden_states, tokens.encoder_rope, shift, scale)
        text_attended, image_attended = self.attention([text, image], [tokens.encoder_mask, None])
        return (
            self.image.finish(hidden_states, image_attended, image_gates),
            self.text.finish(encoder_hidden_states, text_attended, text_gates),
        )


def stream_weights(ours: str, modulation: str, qkv: Sequence[str], norms: Sequence[str], out: str, mlp: str) -> dict:
    """The weight map of one stream of a block."""
    block = "transformer_blocks.*"
    return {
        f"blocks.*.{ours}.modulation.linear": f"{block}.{modulation}.1",
        f"blocks.*.{ours}.qkv": tuple(f"{block}.attn.{name}" for name in qkv),
        f"blocks.*.{ours}.norm_q": f"{block}.attn.{norms[0]}",
        f"blocks.*.{ours}.norm_k": f"{block}.attn.{norms[1]}",
        f"blocks.*.{ours}.out": f"{block}.attn.{out}",
        f"blocks.*.{ours}.feed_forward.up": f"{block}.{mlp}.net.0.proj",
        f"blocks.*.{ours}.feed_forward.down": f"{block}.{mlp}.net.2",
    }


class QwenImageTransformer(Transformer):
    """Arguments are the checkpoint's transformer/config.json.

    Raises `UsageError` for the switches of the family's other members (edit, layered), which this pipeline lacks.
    """

    block_lists = ("blocks",)
    weight_map: ClassVar[Mapping[str, str | tuple[str, ...]]] = {
        **stream_weights("image", "img_mod", ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"), "to_out.0", "img_mlp"),
        **stream_weights(
            "text",
            "txt_mod",
            ("add_q_proj", "add_k_proj", "add_v_proj"),
            ("norm_added_q", "norm_added_k"),
            "to_add_out",
            "txt_mlp",
        ),
        "time_embed": "time_text_embed.timestep_embedder",
        "norm_out.modulation.linear": "norm_out.linear",
    }

    def __init__(
        self,
        patch_size: int = 2,
        in_channels: int = 64,
        out_channels: int | None = 16,
        num_layers: int = 60,
        attention_head_dim: int = 128,
        num_attention_heads: int = 24,
        joint_attention_dim: int = 3584,
        axes_dims_rope: Sequence[int] = (16, 56, 56),
        guidance_embeds: bool = False,
        zero_cond_t: bool = False,
        use_additional_t_cond: bool = False,
        use_layer3d_rope: bool = False,
    ) -> None:
        super().__init__()
        refuse(
            guidance_embeds=guidance_embeds,
            zero_cond_t=zero_cond_t,
            use_additional_t_cond=use_additional_t_cond,
            use_layer3d_rope=use_layer3d_rope,
        )
        dim = num_attention_heads * attention_head_dim
        self.axes_dims_rope = tuple(axes_dims_rope)
        self.time_proj = Timesteps(num_channels=256, flip_sin_to_cos=True, downscale_freq_shift=0, scale=1000)
        self.time_embed = TimestepEmbedding(in_channels=256, time_embed_dim=dim)
        self.txt_norm = nn.RMSNorm(joint_attention_dim, eps=1e-6)
        self.img_in = nn.Linear(in_channels, dim)
        self.txt_in = nn.Linear(joint_attention_dim, dim)
        self.blocks = nn.ModuleList(
            DualStreamBlock(dim, num_attention_heads, attention_head_dim) for _ in range(num_layers)
        )
        self.norm_out = AdaLayerNorm(dim)
        self.proj_out = nn.Linear(dim, patch_size * patch_size * (out_channels or in_channels))

    def embed(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        *,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor | None,
        grid: tuple[int, int, int],
    ) -> Tokens:
        """Packed latents `[B, S, C]`, timesteps `[B]` in 0-1000, text `[B, T, E]` with its mask `[B, T]`.

        `grid` counts the latent tokens: frames, rows, columns.
        """
        image = self.img_in(hidden_states)
        text = self.txt_in(self.txt_norm(encoder_hidden_states))
        # the reference divides by 1000 and multiplies again, in the latents' dtype: in bfloat16 that rounding shows
        fraction = timestep.to(hidden_states.dtype) / 1000
        temb = self.time_embed(self.time_proj(fraction).to(image.dtype))
        rope, text_rope = rope_tables(grid, text.shape[1], self.axes_dims_rope, image.device)
        mask = None if encoder_hidden_states_mask is None else encoder_hidden_states_mask.bool()
        return Tokens(image, text, mask, rope, text_rope, temb)

    def head(self, tokens: Tokens) -> Tensor:
        """`[B, S, D]` to the velocity `[B, S, C]`."""
        return self.proj_out(self.norm_out(tokens.hidden_states, tokens.temb))


def refuse(**switches: bool) -> None:
    """Name the switches that are on."""
    on = [name for name, value in switches.items() if value]
    if on:
        raise UsageError(
            f"transformer/config.json sets {', '.join(on)}: a member of the Qwen-Image family that this pipeline"
            " does not run (guidance-distilled, edit or layered checkpoints need their own model option)"
        )


@lru_cache(maxsize=16)
def rope_tables(
    grid: tuple[int, int, int], text_length: int, axes_dims: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Rotations of the latent tokens `[F * H * W, d / 2, 2]` and of the text tokens `[T, d / 2, 2]`.

    Rows and columns are counted from the picture's centre, so that sizes share positions; text follows on the
    diagonal after the larger half (the paper's MSRoPE).
    """
    frames, height, width = grid
    positions = (
        torch.arange(frames),
        torch.arange(height) - (height - height // 2),
        torch.arange(width) - (width - width // 2),
    )
    axes = [frequencies(p, dim) for p, dim in zip(positions, axes_dims, strict=True)]
    spread = [
        axes[0][:, None, None].expand(frames, height, width, -1, -1),
        axes[1][None, :, None].expand(frames, height, width, -1, -1),
        axes[2][None, None, :].expand(frames, height, width, -1, -1),
    ]
    image = torch.cat(spread, dim=-2).flatten(0, 2)
    start = max(height // 2, width // 2)
    text = torch.cat([frequencies(torch.arange(start, start + text_length), dim) for dim in axes_dims], dim=-2)
    return image.to(device), text.to(device)
