"""Wan 2.1 and 2.2 (https://arxiv.org/abs/2503.20314): latent video tokens with self-attention, text by cross-attention.

Reference: diffusers' `WanTransformer3DModel`, whose checkpoints it loads. The stages that prepare a given first frame
are in `pipeline/stages/wan.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from diffusers.models.embeddings import PixArtAlphaTextProjection, TimestepEmbedding, Timesteps
from torch import Tensor, nn
from torch.nn import functional as F

from hydrarun.core.errors import UsageError
from hydrarun.models.layers.attention import Attention, CrossAttention
from hydrarun.models.layers.linear import FeedForward, HeadsLinear, KVLinear, QKVLinear, RowParallelLinear
from hydrarun.models.layers.norm import RMSNormAcrossHeads, modulate, select_by_token
from hydrarun.models.layers.rope import apply_rope, make_frequencies, make_grid_frequencies
from hydrarun.models.layers.tensor_parallel import ShardSpec
from hydrarun.models.layers.tokens import Tokens
from hydrarun.models.transformer import Transformer


@dataclass
class WanTokens(Tokens):
    """`temb` is projected for the blocks, once for all of them; `head_temb` is unprojected, for the head."""

    head_temb: Any = None  # [B, K, D]


class TableModulation(nn.Module):
    """Shifts, scales and gates: the timestep projection, shared by all blocks, plus the block's own table."""

    def __init__(self, dim: int, parts: int) -> None:
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.empty(1, parts, dim))

    def forward(self, temb: Tensor, index: Tensor | None) -> tuple[Tensor, ...]:
        """Map `[B, K, parts, D]` to `parts` float32 tensors `[B, K, D]`, or, given the `index` `[S]`, `[B, S, D]`."""
        return select_by_token(self.scale_shift_table + temb.float(), index).unbind(2)


class WanBlock(nn.Module):
    """Self-attention over the video tokens, cross-attention to the text, feed-forward."""

    def __init__(self, dim: int, heads: int, ffn_dim: int, cross_attn_norm: bool) -> None:
        super().__init__()
        self.modulation = TableModulation(dim, parts=6)
        head_dim = dim // heads
        self.qkv = QKVLinear(dim, heads, head_dim)
        self.norm_q, self.norm_k = (RMSNormAcrossHeads(heads, head_dim) for _ in range(2))
        self.out = RowParallelLinear(dim, ShardSpec(heads, head_dim))
        self.attention = Attention()
        self.cross_norm = nn.LayerNorm(dim, eps=1e-6) if cross_attn_norm else nn.Identity()
        self.cross_query = HeadsLinear(dim, heads, head_dim)
        self.cross_kv = KVLinear(dim, heads, head_dim)
        self.cross_norm_q, self.cross_norm_k = (RMSNormAcrossHeads(heads, head_dim) for _ in range(2))
        self.cross_out = RowParallelLinear(dim, ShardSpec(heads, head_dim))
        self.cross_attention = CrossAttention()
        self.feed_forward = FeedForward(dim, ffn_dim)

    def modulated(self, tokens: Tokens) -> Tensor:
        """Return the video tokens as the attention projection sees them, `[B, S, D]`."""
        shift, scale, *_ = self.modulation(tokens.temb, tokens.temb_index)
        return modulate(tokens.hidden_states.float(), shift, scale).type_as(tokens.hidden_states)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Map `[B, S, D]` and `[B, T, D]` to the same shapes; the text is not changed."""
        shift, scale, gate, ff_shift, ff_scale, ff_gate = self.modulation(tokens.temb, tokens.temb_index)
        dtype = hidden_states.dtype  # sums are computed in float32, as in the reference
        update = self.attend(modulate(hidden_states.float(), shift, scale).to(dtype), tokens.rope)
        hidden_states = torch.addcmul(hidden_states.float(), update.float(), gate).to(dtype)
        update = self.cross_attend(self.cross_norm(hidden_states.float()).to(dtype), encoder_hidden_states)
        hidden_states = hidden_states + update
        update = self.feed_forward(modulate(hidden_states.float(), ff_shift, ff_scale).to(dtype))
        return torch.addcmul(hidden_states.float(), update.float(), ff_gate).to(dtype), encoder_hidden_states

    def attend(self, hidden_states: Tensor, rope: Tensor) -> Tensor:
        """Apply self-attention, `[B, S, D]` to `[B, S, D]`."""
        query, key, value = self.qkv(hidden_states)
        query, key = apply_rope(self.norm_q(query), rope), apply_rope(self.norm_k(key), rope)
        (attended,) = self.attention({"hidden_states": (query, key, value)})
        return self.out(attended)

    def cross_attend(self, hidden_states: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        """Attend to the text, `[B, S, D]` and `[B, T, D]` to `[B, S, D]`."""
        (query,) = self.cross_query(hidden_states)
        key, value = self.cross_kv(encoder_hidden_states)
        return self.cross_out(self.cross_attention(self.cross_norm_q(query), self.cross_norm_k(key), value))


def map_block_weights() -> dict[str, str | tuple[str, ...]]:
    """Return the weight map of a block."""
    names: dict[str, str | tuple[str, ...]] = {
        "modulation": "",
        "qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
        "norm_q": "attn1.norm_q",
        "norm_k": "attn1.norm_k",
        "out": "attn1.to_out.0",
        "cross_norm": "norm2",
        "cross_query": "attn2.to_q",
        "cross_kv": ("attn2.to_k", "attn2.to_v"),
        "cross_norm_q": "attn2.norm_q",
        "cross_norm_k": "attn2.norm_k",
        "cross_out": "attn2.to_out.0",
        "feed_forward.up": "ffn.net.0.proj",
        "feed_forward.down": "ffn.net.2",
    }
    return {f"blocks.*.{ours}": prefix_names("blocks.*", theirs) for ours, theirs in names.items()}


def prefix_names(module: str, names: str | tuple[str, ...]) -> str | tuple[str, ...]:
    """Prefix the names with `module`; an empty name is the module itself."""
    return f"{module}.{names}".rstrip(".") if isinstance(names, str) else tuple(f"{module}.{name}" for name in names)


class WanTransformer(Transformer):
    """Arguments are the checkpoint's transformer/config.json.

    Raises `UsageError` for model variants that this class does not support. `rope_max_seq_len` sizes the reference's
    rotary tables; ours are as long as the video needs.
    """

    block_lists = ("blocks",)
    sharded_streams = ("hidden_states",)
    keep_in_float32 = ("time_embedder", "scale_shift_table", "cross_norm")
    weight_map: ClassVar[Mapping[str, str | tuple[str, ...]]] = {
        **map_block_weights(),
        "time_embedder": "condition_embedder.time_embedder",
        "time_proj": "condition_embedder.time_proj",
        "text_embedder": "condition_embedder.text_embedder",
        "head_modulation": "",
    }

    def __init__(
        self,
        patch_size: Sequence[int] = (1, 2, 2),
        num_attention_heads: int = 40,
        attention_head_dim: int = 128,
        in_channels: int = 16,
        out_channels: int | None = 16,
        text_dim: int = 4096,
        freq_dim: int = 256,
        ffn_dim: int = 13824,
        num_layers: int = 40,
        cross_attn_norm: bool = True,
        qk_norm: str | None = "rms_norm_across_heads",
        eps: float = 1e-6,
        image_dim: int | None = None,
        added_kv_proj_dim: int | None = None,
        rope_max_seq_len: int = 1024,
        pos_embed_seq_len: int | None = None,
    ) -> None:
        super().__init__()
        refuse_image_encoder(
            image_dim=image_dim, added_kv_proj_dim=added_kv_proj_dim, pos_embed_seq_len=pos_embed_seq_len
        )
        if qk_norm != "rms_norm_across_heads" or eps != 1e-6:
            raise UsageError(
                f"transformer/config.json: qk_norm={qk_norm}, eps={eps}: only the published models'"
                " rms_norm_across_heads and 1e-6 are supported"
            )
        dim = num_attention_heads * attention_head_dim
        self.patch_size = tuple(patch_size)
        self.head_dim = attention_head_dim
        self.patch_embedding = nn.Conv3d(in_channels, dim, kernel_size=self.patch_size, stride=self.patch_size)
        self.timesteps_proj = Timesteps(num_channels=freq_dim, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedder = TimestepEmbedding(in_channels=freq_dim, time_embed_dim=dim)
        self.time_proj = nn.Linear(dim, 6 * dim)
        self.text_embedder = PixArtAlphaTextProjection(text_dim, dim, act_fn="gelu_tanh")
        self.blocks = nn.ModuleList(
            WanBlock(dim, num_attention_heads, ffn_dim, cross_attn_norm) for _ in range(num_layers)
        )
        self.head_modulation = TableModulation(dim, parts=2)
        self.proj_out = nn.Linear(dim, (out_channels or in_channels) * math.prod(self.patch_size))

    def embed(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        *,
        encoder_hidden_states: Tensor,
        condition_latents: Tensor | None = None,
        first_frame: Tensor | None = None,
    ) -> WanTokens:
        """Embed latents `[B, C, F, H, W]`, timesteps `[B]` in 0-1000, text `[B, T, E]`.

        `condition_latents` `[B, C', F, H, W]` are concatenated to the latents as channels. `first_frame`
        `[B, C, 1, H, W]` replaces the latents' first frame and has no noise.
        """
        dtype = hidden_states.dtype
        times = timestep[:, None]
        if condition_latents is not None:
            hidden_states = torch.cat([hidden_states, condition_latents.to(dtype)], dim=1)
        if first_frame is not None:
            hidden_states = torch.cat([first_frame.to(dtype), hidden_states[:, :, 1:]], dim=2)
            times = torch.cat([times, torch.zeros_like(times)], dim=1)
        video = self.patch_embedding(hidden_states)
        temb, projected = self.embed_times(times, dtype)
        return WanTokens(
            hidden_states=video.flatten(2).transpose(1, 2).contiguous(),
            encoder_hidden_states=self.text_embedder(encoder_hidden_states),
            temb=projected,
            grid=tuple(video.shape[2:]),
            head_temb=temb,
        )

    def positions(self, hidden_states: Tensor, *, first_frame: Tensor | None = None, **_: Any) -> dict[str, Any]:
        sizes = zip(hidden_states.shape[2:], self.patch_size, strict=True)
        frames, rows, columns = (side // patch for side, patch in sizes)
        device = hidden_states.device
        return {
            "rope": make_rope_table((frames, rows, columns), self.head_dim, device),
            "temb_index": None if first_frame is None else mark_first_frame(frames, rows * columns, device),
        }

    def embed_times(self, times: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Map timesteps `[B, K]` to embeddings for the head, `[B, K, D]`, and for the blocks, `[B, K, 6, D]`."""
        waves = self.timesteps_proj(times.flatten())
        temb = self.time_embedder(waves.to(self.time_embedder.linear_1.weight.dtype)).to(dtype)
        projected = self.time_proj(F.silu(temb)).unflatten(-1, (6, -1))
        return temb.unflatten(0, times.shape), projected.unflatten(0, times.shape)

    def head(self, tokens: Any) -> Tensor:
        """Map `[B, S, D]` to the velocity `[B, C, F, H, W]`."""
        shift, scale = self.head_modulation(tokens.head_temb.unsqueeze(2), tokens.temb_index)
        normed = modulate(tokens.hidden_states.float(), shift, scale).type_as(tokens.hidden_states)
        patches = self.proj_out(normed).unflatten(-1, (*self.patch_size, -1)).unflatten(1, tokens.grid)
        # [B, frames, rows, columns, f, h, w, C]: put each patch back in its place
        return patches.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)


def refuse_image_encoder(**settings: int | None) -> None:
    """Raise `UsageError` that names the settings that need an image encoder."""
    on = [name for name, value in settings.items() if value is not None]
    if on:
        raise UsageError(
            f"transformer/config.json sets {', '.join(on)}: checkpoints that need an image encoder (Wan 2.1"
            " image-to-video) are not supported. Wan 2.2 image-to-video needs none"
        )


@lru_cache(maxsize=16)
def mark_first_frame(frames: int, tokens_per_frame: int, device: torch.device) -> Tensor:
    """Return 1 for the tokens of the first frame and 0 for all others, `[S]`."""
    return (torch.arange(frames * tokens_per_frame) < tokens_per_frame).long().to(device)


@lru_cache(maxsize=16)
def make_rope_table(grid: tuple[int, int, int], head_dim: int, device: torch.device) -> Tensor:
    """Return the rotary table of the latent tokens, `[F * H * W, d / 2, 2]`: a third of the channels for each axis."""
    side = 2 * (head_dim // 6)
    dims = (head_dim - 2 * side, side, side)
    axes = [make_frequencies(torch.arange(n), dim, precision=torch.float64) for n, dim in zip(grid, dims, strict=True)]
    return make_grid_frequencies(axes).to(device)
