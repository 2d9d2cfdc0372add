"""GLM-Image (https://huggingface.co/zai-org/GLM-Image): diffusion after an autoregressive prior model.

The prior model draws one token per 32 x 32 pixels; the diffusion transformer draws the picture from these tokens. Input
images are a prefix: each passes through the blocks once, separately and without noise, and the picture attends to the
resulting keys and values. Reference: diffusers' `GlmImagePipeline` and `GlmImageTransformer2DModel`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar

import torch
from diffusers.models.attention import FeedForward as Projector
from diffusers.models.embeddings import PixArtAlphaTextProjection, TimestepEmbedding, Timesteps
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from hydrarun.models.layers.attention import Attention, Prefix
from hydrarun.models.layers.linear import FeedForward, QKVLinear, RowParallelLinear
from hydrarun.models.layers.norm import AdaLayerNorm, Modulation, modulate
from hydrarun.models.layers.patchify import pack_latents, unpack_latents
from hydrarun.models.layers.rope import make_frequencies, make_grid_frequencies, rotate_halves
from hydrarun.models.layers.tensor_parallel import ShardSpec
from hydrarun.models.layers.tokens import Grid, Tokens
from hydrarun.models.transformer import NEGATIVE, Arguments, Inputs, Transformer

EPS = 1e-5  # epsilon of all norms


@dataclass
class GlmImageTokens(Tokens):
    """Tokens with an optional prefix of input images."""

    prefix: Sequence[Prefix] | None = None  # one per block; None: no prefix
    kept: list[Prefix] | None = None  # each block appends its keys and values to it, as a prefix; None: not kept


class GlmImageBlock(nn.Module):
    """Shared weights for text and image tokens, except shifts, scales and gates. `index`: the block's index."""

    def __init__(self, index: int, dim: int, heads: int, head_dim: int, time_embed_dim: int) -> None:
        super().__init__()
        self.index = index
        self.modulation = Modulation(dim, parts=12, width=time_embed_dim)
        self.qkv = QKVLinear(dim, heads, head_dim)
        self.out = RowParallelLinear(dim, ShardSpec(heads, head_dim))
        self.feed_forward = FeedForward(dim)
        self.attention = Attention()

    def modulated(self, tokens: Tokens) -> Tensor:
        """Return the image tokens as the attention projection sees them, `[B, S, D]`."""
        shift, _, scale, *_ = self.modulation(tokens.temb[:, :1])
        return modulate(tokens.hidden_states, shift, scale, EPS)

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor | None, tokens: GlmImageTokens
    ) -> tuple[Tensor, Tensor | None]:
        """Map `[B, S, D]` and `[B, T, D]` to the same shapes; the text may be None."""
        parts = self.modulation(tokens.temb[:, :1])
        image_parts, text_parts = parts[::2], parts[1::2]
        image = self.project(hidden_states, image_parts, tokens.rope)
        streams, masks = {"hidden_states": image}, {}
        if encoder_hidden_states is not None:
            streams = {"encoder_hidden_states": self.project(encoder_hidden_states, text_parts, None), **streams}
            masks = {"encoder_hidden_states": tokens.encoder_mask}
        if tokens.kept is not None:
            tokens.kept.append(self.attention.keep("hidden_states", *image[1:]))
        prefix = None if tokens.prefix is None else tokens.prefix[self.index]
        *text_attended, image_attended = self.attention(streams, masks, prefix)
        hidden_states = self.finish(hidden_states, image_attended, image_parts)
        if encoder_hidden_states is not None:
            encoder_hidden_states = self.finish(encoder_hidden_states, text_attended[0], text_parts)
        return hidden_states, encoder_hidden_states

    def project(
        self, hidden_states: Tensor, parts: Sequence[Tensor], rope: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Map `[B, S, D]` to query, key, value `[B, S, H, d]`. Norm query and key; rotate them by `rope`, if any."""
        shift, scale, *_ = parts
        query, key, value = self.qkv(modulate(hidden_states, shift, scale, EPS))
        query, key = (F.layer_norm(x, x.shape[-1:], eps=EPS) for x in (query, key))
        return (query, key, value) if rope is None else (rotate_halves(query, rope), rotate_halves(key, rope), value)

    def finish(self, hidden_states: Tensor, attended: Tensor, parts: Sequence[Tensor]) -> Tensor:
        """Add the outputs of attention and feed-forward to `[B, S, D]`."""
        _, _, gate_attention, shift, scale, gate_feed_forward = parts
        hidden_states = torch.addcmul(hidden_states, gate_attention, self.out(attended))
        update = self.feed_forward(modulate(hidden_states, shift, scale, EPS))
        return torch.addcmul(hidden_states, gate_feed_forward, update)


class TimeAndSizeEmbedding(nn.Module):
    """Embeds timesteps and the picture's height and width, with the crop corner at 0."""

    def __init__(self, dim: int, condition_dim: int) -> None:
        super().__init__()
        self.time_proj = Timesteps(num_channels=dim, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.condition_proj = Timesteps(num_channels=condition_dim, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.timestep_embedder = TimestepEmbedding(in_channels=dim, time_embed_dim=dim)
        self.condition_embedder = PixArtAlphaTextProjection(4 * condition_dim, dim, act_fn="silu")

    def forward(self, timestep: Tensor, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Map `[B]` to `[B, D]`, before the SiLU that `Modulation` applies."""
        corner_and_size = torch.tensor([0, 0, *size], device=timestep.device)
        condition = self.condition_embedder(self.condition_proj(corner_and_size).view(1, -1).to(dtype))
        return self.timestep_embedder(self.time_proj(timestep).to(dtype)) + condition


class GlmImageTransformer(Transformer):
    """Arguments are the checkpoint's transformer/config.json."""

    block_lists = ("blocks",)
    weight_map: ClassVar[Mapping[str, str | tuple[str, ...]]] = {
        "image_projector": "image_projector.proj",
        "blocks.*.modulation.linear": "transformer_blocks.*.norm1.linear",
        "blocks.*.qkv": tuple(f"transformer_blocks.*.attn1.{name}" for name in ("to_q", "to_k", "to_v")),
        "blocks.*.out": "transformer_blocks.*.attn1.to_out.0",
        "blocks.*.feed_forward.up": "transformer_blocks.*.ff.net.0.proj",
        "blocks.*.feed_forward.down": "transformer_blocks.*.ff.net.2",
        "norm_out.modulation.linear": "norm_out.linear",
    }

    def __init__(
        self,
        patch_size: int = 2,
        in_channels: int = 16,
        out_channels: int = 16,
        num_layers: int = 30,
        attention_head_dim: int = 40,
        num_attention_heads: int = 64,
        text_embed_dim: int = 1472,
        time_embed_dim: int = 512,
        condition_dim: int = 256,
        prior_vq_quantizer_codebook_size: int = 16384,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.head_dim = attention_head_dim
        dim = num_attention_heads * attention_head_dim
        self.image_projector = nn.Linear(in_channels * patch_size * patch_size, dim)
        self.glyph_projector = Projector(text_embed_dim, dim, inner_dim=dim, activation_fn="gelu")
        self.prior_token_embedding = nn.Embedding(prior_vq_quantizer_codebook_size, dim)
        self.prior_projector = Projector(dim, dim, inner_dim=dim, activation_fn="linear-silu")
        self.time_condition_embed = TimeAndSizeEmbedding(time_embed_dim, condition_dim)
        self.blocks = nn.ModuleList(
            GlmImageBlock(index, dim, num_attention_heads, attention_head_dim, time_embed_dim)
            for index in range(num_layers)
        )
        self.norm_out = AdaLayerNorm(dim, time_embed_dim, EPS)
        self.proj_out = nn.Linear(dim, patch_size * patch_size * out_channels)
        #: `{latents of input images: their prefix}`; an entry is dropped with its latents
        self.prefixes = WeakTensorKeyDictionary()

    def embed(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        *,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor | None,
        told: Tensor,
        grid: Grid,
        prior_tokens: Tensor,
        **sizes: Any,
    ) -> GlmImageTokens:
        """Embed latents `[B, C, 1, h, w]`, timesteps `[B]` in 1-1000, quoted text `[B, T, E]` and its mask `[B, T]`.

        `told` `[B]` is 1 if the branch uses the `prior_tokens` `[B, S]`, otherwise 0. `sizes`: as in `make_temb`.
        """
        image = self.project(pack_latents(hidden_states, self.patch_size), prior_tokens, told)
        text = self.glyph_projector(encoder_hidden_states)
        temb = self.make_temb(timestep, image.dtype, grid=grid, **sizes)
        return GlmImageTokens(image, text, encoder_hidden_states_mask, temb=temb, grid=grid)

    def project(self, packed: Tensor, prior_tokens: Tensor, told: Tensor | None = None) -> Tensor:
        """Map packed latents `[B, S, C]` and their prior token ids `[B, S]` to `[B, S, D]`. `told`: None means 1."""
        prior = self.prior_token_embedding(prior_tokens)
        if told is not None:
            prior = prior * told[:, None, None].to(prior.dtype)
        return self.image_projector(packed) + self.prior_projector(prior)

    def positions(self, hidden_states: Tensor, *, grid: Grid, **_: Any) -> dict[str, Any]:
        return {"rope": make_rope_table(grid, self.head_dim, hidden_states.device)}

    def make_temb(
        self,
        timestep: Tensor,
        dtype: torch.dtype,
        *,
        grid: Grid,
        height: int,
        width: int,
        image_grids: tuple[Grid, ...] = (),
        **_: Any,
    ) -> Tensor:
        """Map timesteps `[B]` to `[B, K, D]`: the picture's, then one for each input image, which has no noise."""
        pixels = height // grid[1]  # per side of a token
        at_rest = torch.zeros_like(timestep)
        each = [(timestep - 1, (height, width))]
        each += [(at_rest, (rows * pixels, columns * pixels)) for _, rows, columns in image_grids]
        return torch.stack([self.time_condition_embed(*one, dtype) for one in each], dim=1)

    def select_branch(self, inputs: Inputs, branch: str) -> Arguments:
        """Add the prefix of the input images, if any, except for the negative branch.

        The negative branch still computes a missing prefix: with sharded weights, all ranks must run the blocks equally
        often.
        """
        latents, timestep, given, positions, rows = super().select_branch(inputs, branch)
        if given["image_latents"] is not None:
            if given["image_latents"] not in self.prefixes:
                self.prefixes[given["image_latents"]] = self.make_prefix(timestep, given, rows)
            if branch != NEGATIVE:
                positions = {**positions, "prefix": self.prefixes[given["image_latents"]]}
        return latents, timestep, given, positions, rows

    def make_prefix(self, timestep: Tensor, given: Mapping[str, Any], rows: Tensor | None) -> list[Prefix]:
        """Return each block's keys and values of the input images, concatenated."""
        latents, prior = given["image_latents"][:1], given["image_prior_tokens"][:1]
        temb = self.make_temb(timestep, latents.dtype, **given) if rows is None else rows
        lengths = [rows * columns for _, rows, columns in given["image_grids"]]
        each = zip(given["image_grids"], latents.split(lengths, 1), prior.split(lengths, 1), strict=True)
        kept = []
        for place, (grid, packed, ids) in enumerate(each, start=1):
            tokens = GlmImageTokens(self.project(packed, ids), temb=temb[:1, place : place + 1], grid=grid, kept=[])
            call = self.shard(replace(tokens, **self.positions(packed, grid=grid)))
            self.run_blocks(call)
            kept.append(call.tokens.kept)
        blocks = zip(*kept, strict=True)  # per block, the keys and values of every image
        return [(torch.cat([key for key, _ in one], 1), torch.cat([value for _, value in one], 1)) for one in blocks]

    def kept_bytes(self) -> int:
        return sum(kept.nbytes for prefix in self.prefixes.values() for block in prefix for kept in block)

    def head(self, tokens: Tokens) -> Tensor:
        """Map `[B, S, D]` to the velocity `[B, C, 1, h, w]`, in float32 like the rest of the reference's step."""
        predicted = self.proj_out(self.norm_out(tokens.hidden_states, tokens.temb[:, :1]))
        return unpack_latents(predicted, tokens.grid, self.patch_size).float()


@lru_cache(maxsize=16)
def make_rope_table(grid: Grid, head_dim: int, device: torch.device) -> Tensor:
    """Return the rotary table `[S, d / 2, 2]` of a picture's tokens: half of the pairs by row, half by column."""
    _, rows, columns = grid
    axes = [torch.zeros(1, 0, 2), *(make_frequencies(torch.arange(side), head_dim // 2) for side in (rows, columns))]
    return make_grid_frequencies(axes).to(device)
