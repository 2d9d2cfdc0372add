"""The dual-stream block (MMDiT; Stable Diffusion 3, https://arxiv.org/abs/2403.03206).

Text and image tokens have separate weights and meet in joint attention. Several model families use this block; their
checkpoints differ only in names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from hydrarun.models.layers.attention import Attention
from hydrarun.models.layers.linear import FeedForward, QKVLinear, RowParallelLinear
from hydrarun.models.layers.norm import Modulation, modulate
from hydrarun.models.layers.rope import apply_rope
from hydrarun.models.layers.tensor_parallel import ShardSpec
from hydrarun.models.layers.tokens import Tokens

FLOAT16_MAX = torch.finfo(torch.float16).max


class ContextStream(nn.Module):
    """A stream that is only attended to. Its own output is not used."""

    #: number of modulation outputs: shift and scale before attention, then the `gates` of `finish`
    parts: ClassVar[int] = 2

    def __init__(self, dim: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.modulation = Modulation(dim, self.parts)
        self.qkv = QKVLinear(dim, heads, head_dim)
        self.norm_q = nn.RMSNorm(head_dim, eps=1e-6)
        self.norm_k = nn.RMSNorm(head_dim, eps=1e-6)

    def project(self, hidden_states: Tensor, rope: Tensor | None, shift: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        """Map `[B, S, D]` to query, key, value `[B, S, H, d]`. Norm query and key; rotate them by `rope`, if any."""
        query, key, value = self.qkv(modulate(hidden_states, shift, scale))
        query, key = self.norm_q(query), self.norm_k(key)
        return (query, key, value) if rope is None else (apply_rope(query, rope), apply_rope(key, rope), value)

    def finish(self, hidden_states: Tensor, attended: Tensor, gates: Sequence[Tensor]) -> Tensor:
        """Return the tokens `[B, S, D]` unchanged."""
        return hidden_states


class TokenStream(ContextStream):
    """One stream's part of a block: the layers before and after the joint attention."""

    parts = 6

    def __init__(self, dim: int, heads: int, head_dim: int, gated: bool = False) -> None:
        super().__init__(dim, heads, head_dim)
        self.out = RowParallelLinear(dim, ShardSpec(heads, head_dim))
        self.feed_forward = FeedForward(dim, gated=gated)

    def finish(self, hidden_states: Tensor, attended: Tensor, gates: Sequence[Tensor]) -> Tensor:
        """Add the outputs of attention and feed-forward to `[B, S, D]`."""
        gate_attention, shift, scale, gate_feed_forward = gates
        hidden_states = torch.addcmul(hidden_states, gate_attention, self.out(attended))
        update = self.feed_forward(modulate(hidden_states, shift, scale))
        return clip_to_float16(torch.addcmul(hidden_states, gate_feed_forward, update))


class DualStreamBlock(nn.Module):
    """Text and image tokens with separate weights and joint attention. `image` and `text` build the streams."""

    def __init__(
        self,
        dim: int,
        heads: int,
        head_dim: int,
        image: Callable[[int, int, int], TokenStream] = TokenStream,
        text: Callable[[int, int, int], ContextStream] = TokenStream,
    ) -> None:
        super().__init__()
        self.image = image(dim, heads, head_dim)
        self.text = text(dim, heads, head_dim)
        self.attention = Attention()

    def modulated(self, tokens: Tokens) -> Tensor:
        """Return the image tokens as the attention projection sees them, `[B, S, D]`."""
        shift, scale, *_ = self.image.modulation(tokens.temb, tokens.temb_index)
        return modulate(tokens.hidden_states, shift, scale)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Map `[B, S, D]` and `[B, T, D]` to the same shapes."""
        shift, scale, *image_gates = self.image.modulation(tokens.temb, tokens.temb_index)
        image = self.image.project(hidden_states, tokens.rope, shift, scale)
        shift, scale, *text_gates = self.text.modulation(tokens.temb[:, :1])
        text = self.text.project(encoder_hidden_states, tokens.encoder_rope, shift, scale)
        text_attended, image_attended = self.attention(
            {"encoder_hidden_states": text, "hidden_states": image}, {"encoder_hidden_states": tokens.encoder_mask}
        )
        return (
            self.image.finish(hidden_states, image_attended, image_gates),
            self.text.finish(encoder_hidden_states, text_attended, text_gates),
        )


def clip_to_float16(hidden_states: Tensor) -> Tensor:
    """Clip float16 tensors to their finite range, which later blocks' activations exceed; return others unchanged."""
    return hidden_states.clip(-FLOAT16_MAX, FLOAT16_MAX) if hidden_states.dtype == torch.float16 else hidden_states


def map_dual_stream_weights(
    modulation: tuple[str, str], feed_forward: tuple[str, str], theirs: str = "transformer_blocks.*"
) -> dict[str, str | tuple[str, ...]]:
    """Return the weight map of `blocks.*` (DualStreamBlocks) for a checkpoint with diffusers' joint attention names.

    `modulation` and `feed_forward` name the checkpoint's layers: the image's, then the text's.
    """
    attention = {
        "image": ("to_q", "to_k", "to_v", "norm_q", "norm_k", "to_out.0"),
        "text": ("add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k", "to_add_out"),
    }
    weights: dict[str, str | tuple[str, ...]] = {}
    for (stream, names), shifts, mlp in zip(attention.items(), modulation, feed_forward, strict=True):
        *qkv, norm_q, norm_k, out = (f"{theirs}.attn.{name}" for name in names)
        weights |= {
            f"blocks.*.{stream}.modulation.linear": f"{theirs}.{shifts}",
            f"blocks.*.{stream}.qkv": tuple(qkv),
            f"blocks.*.{stream}.norm_q": norm_q,
            f"blocks.*.{stream}.norm_k": norm_k,
            f"blocks.*.{stream}.out": out,
            f"blocks.*.{stream}.feed_forward.up": f"{theirs}.{mlp}.net.0.proj",
            f"blocks.*.{stream}.feed_forward.down": f"{theirs}.{mlp}.net.2",
        }
    return weights
