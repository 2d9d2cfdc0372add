"""Stable Audio Open (https://arxiv.org/abs/2407.14358): sound tokens with self-attention, text by cross-attention.

Reference: diffusers' `StableAudioDiTModel`, whose checkpoints it loads, and `StableAudioPipeline`. The
blocks receive timestep and seconds as one token in front of the sound tokens; there is no modulation.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, ClassVar

import torch
from diffusers.models.transformers.stable_audio_transformer import StableAudioGaussianFourierProjection
from torch import Tensor, nn

from hydrarun.models.layers.attention import Attention, CrossAttention
from hydrarun.models.layers.linear import ColumnParallelLinear, FeedForward, KVLinear, QKVLinear, RowParallelLinear
from hydrarun.models.layers.rope import make_frequencies, rotate_halves
from hydrarun.models.layers.tensor_parallel import ShardSpec
from hydrarun.models.layers.tokens import Tokens
from hydrarun.models.transformer import Transformer


class CrossQueryLinear(ColumnParallelLinear):
    """Query projection, sharded in whole groups of query heads that share a key and value head."""

    def __init__(self, dim: int, groups: ShardSpec, head_dim: int) -> None:
        super().__init__(dim, groups, bias=False)
        self.head_dim = head_dim

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map `[B, S, D]` to `[B, S, H, d]`, with H heads on this rank."""
        return super().forward(hidden_states).unflatten(-1, (-1, self.head_dim))


class StableAudioBlock(nn.Module):
    """Self-attention over the sound tokens, cross-attention to text and seconds, feed-forward."""

    def __init__(self, dim: int, heads: int, shared_heads: int, context_dim: int) -> None:
        super().__init__()
        head_dim = dim // heads
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim, eps=1e-5) for _ in range(3))
        self.qkv = QKVLinear(dim, heads, head_dim, bias=False)
        self.attention = Attention()
        self.out = RowParallelLinear(dim, ShardSpec(heads, head_dim), bias=False)
        groups = ShardSpec(shared_heads, heads // shared_heads * head_dim)
        self.cross_query = CrossQueryLinear(dim, groups, head_dim)
        self.cross_kv = KVLinear(context_dim, shared_heads, head_dim, bias=False)
        self.cross_attention = CrossAttention()
        self.cross_out = RowParallelLinear(dim, groups, bias=False)
        self.feed_forward = FeedForward(dim, gated=True)

    def modulated(self, tokens: Tokens) -> Tensor:
        """Return the tokens as the attention projection sees them, `[B, S, D]`."""
        return self.norm1(tokens.hidden_states)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Map `[B, S, D]` and `[B, T, E]` to the same shapes; the text is not changed."""
        query, key, value = self.qkv(self.norm1(hidden_states))
        query, key = rotate_halves(query, tokens.rope), rotate_halves(key, tokens.rope)
        (attended,) = self.attention({"hidden_states": (query, key, value)})
        hidden_states = self.out(attended) + hidden_states
        query, (key, value) = self.cross_query(self.norm2(hidden_states)), self.cross_kv(encoder_hidden_states)
        hidden_states = self.cross_out(self.cross_attention(query, key, value)) + hidden_states
        return self.feed_forward(self.norm3(hidden_states)) + hidden_states, encoder_hidden_states


def map_block_weights() -> dict[str, str | tuple[str, ...]]:
    """Return the weight map of a block."""
    theirs = "transformer_blocks.*"
    return {
        **{f"blocks.*.{norm}": f"{theirs}.{norm}" for norm in ("norm1", "norm2", "norm3")},
        "blocks.*.qkv": tuple(f"{theirs}.attn1.{name}" for name in ("to_q", "to_k", "to_v")),
        "blocks.*.out": f"{theirs}.attn1.to_out.0",
        "blocks.*.cross_query": f"{theirs}.attn2.to_q",
        "blocks.*.cross_kv": tuple(f"{theirs}.attn2.{name}" for name in ("to_k", "to_v")),
        "blocks.*.cross_out": f"{theirs}.attn2.to_out.0",
        "blocks.*.feed_forward.up": f"{theirs}.ff.net.0.proj",
        "blocks.*.feed_forward.down": f"{theirs}.ff.net.2",
    }


class StableAudioTransformer(Transformer):
    """Arguments are the checkpoint's transformer/config.json. `sample_size`: latents of a full-length sound."""

    block_lists = ("blocks",)
    sharded_streams = ("hidden_states",)
    weight_map: ClassVar[Mapping[str, str | tuple[str, ...]]] = map_block_weights()

    def __init__(
        self,
        sample_size: int = 1024,
        in_channels: int = 64,
        num_layers: int = 24,
        attention_head_dim: int = 64,
        num_attention_heads: int = 24,
        num_key_value_attention_heads: int = 12,
        out_channels: int = 64,
        cross_attention_dim: int = 768,
        time_proj_dim: int = 256,
        global_states_input_dim: int = 1536,
        cross_attention_input_dim: int = 768,
    ) -> None:
        super().__init__()
        dim = num_attention_heads * attention_head_dim
        self.rotated = attention_head_dim // 2  # rotated channels per head
        self.time_proj = StableAudioGaussianFourierProjection(
            embedding_size=time_proj_dim // 2, flip_sin_to_cos=True, log=False, set_W_to_weight=False
        )
        self.timestep_proj = make_mlp(time_proj_dim, dim, bias=True)
        self.global_proj = make_mlp(global_states_input_dim, dim, bias=False)
        self.cross_attention_proj = make_mlp(cross_attention_input_dim, cross_attention_dim, bias=False)
        self.preprocess_conv = nn.Conv1d(in_channels, in_channels, 1, bias=False)
        self.proj_in = nn.Linear(in_channels, dim, bias=False)
        self.blocks = nn.ModuleList(
            StableAudioBlock(dim, num_attention_heads, num_key_value_attention_heads, cross_attention_dim)
            for _ in range(num_layers)
        )
        self.proj_out = nn.Linear(dim, out_channels, bias=False)
        self.postprocess_conv = nn.Conv1d(out_channels, out_channels, 1, bias=False)

    def embed(
        self, hidden_states: Tensor, timestep: Tensor, *, encoder_hidden_states: Tensor, global_hidden_states: Tensor
    ) -> Tokens:
        """Embed latents `[B, C, L]`, timesteps `[B]` in 0-1, text and seconds `[B, T, E]`, seconds `[B, 1, 2 E]`."""
        time = self.timestep_proj(self.time_proj(timestep.to(hidden_states.dtype)))
        first = self.global_proj(global_hidden_states) + time.unsqueeze(1)
        sound = self.proj_in((self.preprocess_conv(hidden_states) + hidden_states).transpose(1, 2))
        return Tokens(
            torch.cat([first, sound], dim=1),
            self.cross_attention_proj(encoder_hidden_states),
            grid=(1, 1, sound.shape[1]),
        )

    def positions(self, hidden_states: Tensor, **_: Any) -> dict[str, Any]:
        return {"rope": make_rope_table(1 + hidden_states.shape[2], self.rotated, hidden_states.device)}

    def head(self, tokens: Tokens) -> Tensor:
        """Map `[B, 1 + L, D]` to the velocity `[B, C, L]`, dropping the first token."""
        sound = self.proj_out(tokens.hidden_states).transpose(1, 2)[:, :, 1:]
        return self.postprocess_conv(sound) + sound


def make_mlp(width: int, dim: int, bias: bool) -> nn.Sequential:
    """Build two linear layers with a SiLU between them."""
    return nn.Sequential(nn.Linear(width, dim, bias=bias), nn.SiLU(), nn.Linear(dim, dim, bias=bias))


@lru_cache(maxsize=16)
def make_rope_table(tokens: int, dim: int, device: torch.device) -> Tensor:
    """Return the rotary table `[S, dim / 2, 2]` of `tokens` tokens, including the one in front of the sound."""
    return make_frequencies(torch.arange(tokens), dim).to(device)
