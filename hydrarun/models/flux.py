"""FLUX.1 (https://github.com/black-forest-labs/flux): 19 dual-stream blocks, then 38 single-stream blocks.

Includes the code that related models share, which differ in their conditioning and in their token positions.
Reference: diffusers' `FluxTransformer2DModel`, whose checkpoints it loads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, ClassVar

import torch
from diffusers.models.embeddings import (
    CombinedTimestepGuidanceTextProjEmbeddings,
    CombinedTimestepTextProjEmbeddings,
    TimestepEmbedding,
    Timesteps,
)
from torch import Tensor, nn

from hydrarun.models.layers.attention import Attention
from hydrarun.models.layers.dual_stream import DualStreamBlock, TokenStream, clip_to_float16, map_dual_stream_weights
from hydrarun.models.layers.linear import GatedColumnParallelLinear, QKVLinear, RowParallelLinear
from hydrarun.models.layers.norm import AdaLayerNorm, Modulation, modulate
from hydrarun.models.layers.rope import apply_rope, make_frequencies, make_grid_frequencies
from hydrarun.models.layers.tensor_parallel import ShardSpec
from hydrarun.models.layers.tokens import Tokens
from hydrarun.models.transformer import Transformer

Grid = tuple[int, int, int]


class SingleStreamBlock(nn.Module):
    """Shared weights for text and image. Attention and feed-forward run in parallel into one projection."""

    def __init__(self, dim: int, heads: int, head_dim: int, gated: bool = False) -> None:
        super().__init__()
        self.modulation = Modulation(dim, parts=3)
        self.qkv = QKVLinear(dim, heads, head_dim)
        self.norm_q = nn.RMSNorm(head_dim, eps=1e-6)
        self.norm_k = nn.RMSNorm(head_dim, eps=1e-6)
        self.up = GatedColumnParallelLinear(dim, 4 * dim, gated)
        self.out = RowParallelLinear(dim, ShardSpec(heads, head_dim), ShardSpec(4 * dim))
        self.attention = Attention()

    def modulated(self, tokens: Tokens) -> Tensor:
        """Return the image tokens as the attention projection sees them, `[B, S, D]`."""
        shift, scale, _ = self.modulation(tokens.temb)
        return modulate(tokens.hidden_states, shift, scale)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Map `[B, S, D]` and `[B, T, D]` to the same shapes."""
        lengths = [encoder_hidden_states.shape[1], hidden_states.shape[1]]
        joint = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        shift, scale, gate = self.modulation(tokens.temb)
        normed = modulate(joint, shift, scale)
        query, key, value = self.qkv(normed)
        rope = torch.cat([tokens.encoder_rope, tokens.rope])
        query, key = apply_rope(self.norm_q(query), rope), apply_rope(self.norm_k(key), rope)
        text, image = zip(*(x.split(lengths, dim=1) for x in (query, key, value)), strict=True)
        attended = torch.cat(self.attention({"encoder_hidden_states": text, "hidden_states": image}), dim=1)
        joint = torch.addcmul(joint, gate, self.out(torch.cat([attended, self.up(normed)], dim=-1)))
        encoder_hidden_states, hidden_states = clip_to_float16(joint).split(lengths, dim=1)
        return hidden_states, encoder_hidden_states


def map_single_stream_weights() -> dict[str, str | tuple[str, ...]]:
    """Return the weight map of `single_blocks.*`."""
    theirs = "single_transformer_blocks.*"
    return {
        "single_blocks.*.modulation.linear": f"{theirs}.norm.linear",
        "single_blocks.*.qkv": tuple(f"{theirs}.attn.{name}" for name in ("to_q", "to_k", "to_v")),
        "single_blocks.*.norm_q": f"{theirs}.attn.norm_q",
        "single_blocks.*.norm_k": f"{theirs}.attn.norm_k",
        "single_blocks.*.up": f"{theirs}.proj_mlp",
        "single_blocks.*.out": f"{theirs}.proj_out",
    }


@dataclass(eq=False, repr=False)
class StreamsTransformer(Transformer):
    """Dual-stream blocks, then single-stream blocks, conditioned on timestep and text.

    The fields are the checkpoint's transformer/config.json. A subclass declares the fields that it adds and those whose
    published value differs. It has a `time_embed`, or overrides `make_temb` if it has more conditioning. Images to edit
    are extra latent tokens, after the predicted ones.
    """

    patch_size: int = 1
    in_channels: int = 64
    out_channels: int | None = None
    num_layers: int = 19
    num_single_layers: int = 38
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    axes_dims_rope: Sequence[int] = (16, 56, 56)

    block_lists = ("blocks", "single_blocks")
    weight_map: ClassVar[Mapping[str, str | tuple[str, ...]]] = {
        **map_dual_stream_weights(
            modulation=("norm1.linear", "norm1_context.linear"), feed_forward=("ff", "ff_context")
        ),
        **map_single_stream_weights(),
        "norm_out.modulation.linear": "norm_out.linear",
    }
    #: whether the feed-forwards are gated
    gated: ClassVar[bool] = False
    #: whether a text token's row and column are its index in the text; otherwise 0
    text_is_counted: ClassVar[bool] = True
    #: whether pictures start after the text, in rows, columns and number; otherwise at 0
    pictures_follow_text: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__init__()  # nn.Module's
        heads, head_dim = self.num_attention_heads, self.attention_head_dim
        self.dim = dim = heads * head_dim
        self.axes_dims_rope = tuple(self.axes_dims_rope)
        self.context_embedder = nn.Linear(self.joint_attention_dim, dim)
        self.x_embedder = nn.Linear(self.in_channels, dim)
        stream = partial(TokenStream, gated=self.gated)
        self.blocks = nn.ModuleList(
            DualStreamBlock(dim, heads, head_dim, stream, stream) for _ in range(self.num_layers)
        )
        self.single_blocks = nn.ModuleList(
            SingleStreamBlock(dim, heads, head_dim, self.gated) for _ in range(self.num_single_layers)
        )
        self.norm_out = AdaLayerNorm(dim)
        self.proj_out = nn.Linear(dim, self.patch_size**2 * (self.out_channels or self.in_channels))

    def embed(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        *,
        encoder_hidden_states: Tensor,
        grid: Grid,
        image_latents: Tensor | None = None,
        image_grids: tuple[Grid, ...] = (),
        **others: Any,
    ) -> Tokens:
        """Embed packed latents `[B, S, C]`, timesteps `[B]` in 0-1000, text `[B, T, E]`, and `make_temb`'s inputs.

        `grid` counts the latent tokens: frames, rows, columns. `image_latents` `[B, I, C]` are the packed images to
        edit, concatenated, and `image_grids` their grids.
        """
        temb = self.make_temb(timestep, hidden_states.dtype, **others)
        if image_latents is not None:
            hidden_states = torch.cat([hidden_states, image_latents.to(hidden_states.dtype)], dim=1)
        image, text = self.x_embedder(hidden_states), self.context_embedder(encoder_hidden_states)
        return Tokens(image, text, temb=temb, grid=grid)

    def positions(
        self,
        hidden_states: Tensor,
        *,
        encoder_hidden_states: Tensor,
        grid: Grid,
        image_grids: tuple[Grid, ...] = (),
        **_: Any,
    ) -> dict[str, Any]:
        rope, text_rope = make_rope_tables(
            (grid, *image_grids),
            encoder_hidden_states.shape[1],
            self.axes_dims_rope,
            self.text_is_counted,
            self.pictures_follow_text,
            hidden_states.device,
        )
        return {"rope": rope, "encoder_rope": text_rope}

    def make_temb(self, *times: Any, **_: Any) -> Tensor:
        """Map timesteps `[B]` and the latents' dtype to `[B, 1, D]`."""
        return self.time_embed(*times)

    def head(self, tokens: Tokens) -> Tensor:
        """Map `[B, S, D]` to the velocity `[B, S, C]` of the tokens of `grid`, which come first."""
        predicted = tokens.hidden_states[:, : math.prod(tokens.grid)]
        return self.proj_out(self.norm_out(predicted, tokens.temb))


class TimeEmbedding(TimestepEmbedding):
    """Embeds timesteps `[B]` in 0-1000 as `[B, 1, D]`, for models conditioned on timestep and text alone."""

    def __init__(self, dim: int) -> None:
        super().__init__(in_channels=256, time_embed_dim=dim)
        self.project = Timesteps(num_channels=256, flip_sin_to_cos=True, downscale_freq_shift=0)

    def forward(self, timestep: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the embedding, in `dtype`."""
        return super().forward(self.project(round_timestep(timestep, dtype)).to(dtype)).unsqueeze(1)


def round_timestep(timestep: Tensor, dtype: torch.dtype) -> Tensor:
    """Round as the reference does, by dividing and multiplying by 1000 in the latents' `dtype`; matters in bfloat16."""
    return timestep.to(dtype) / 1000 * 1000


@dataclass(eq=False, repr=False)
class FluxTransformer(StreamsTransformer):
    """Also conditioned on the pooled prompt embedding and, if guidance-distilled, on the guidance scale."""

    pooled_projection_dim: int = 768
    guidance_embeds: bool = False

    text_is_counted = False

    def __post_init__(self) -> None:
        super().__post_init__()
        embeddings = (
            CombinedTimestepGuidanceTextProjEmbeddings if self.guidance_embeds else CombinedTimestepTextProjEmbeddings
        )
        self.time_text_embed = embeddings(embedding_dim=self.dim, pooled_projection_dim=self.pooled_projection_dim)

    def make_temb(
        self,
        timestep: Tensor,
        dtype: torch.dtype,
        *,
        pooled_projections: Tensor,
        guidance: Tensor | None,
        **_: Any,
    ) -> Tensor:
        """Map timesteps `[B]`, pooled prompt embeddings `[B, P]` and the scale `[B]` to `[B, 1, D]`.

        The scale is an input of guidance-distilled checkpoints; None for others.
        """
        times = [round_timestep(timestep, dtype)]
        if guidance is not None:
            times.append(guidance.to(dtype) * 1000)
        return self.time_text_embed(*times, pooled_projections).unsqueeze(1)


@lru_cache(maxsize=16)
def make_rope_tables(
    grids: tuple[Grid, ...],
    text_length: int,
    axes_dims: tuple[int, ...],
    text_is_counted: bool,
    pictures_follow_text: bool,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Return rotary tables of all pictures' latent tokens `[S, d / 2, 2]` and of the text tokens `[T, d / 2, 2]`.

    A token's position is a number, a row and a column. A picture's rows and columns count from its corner. Text has
    number 0 and lies on the diagonal or at 0; see `StreamsTransformer`.
    """

    def angles(places: Sequence[Tensor]) -> list[Tensor]:
        pairs = zip(places, axes_dims, strict=True)
        return [make_frequencies(place, dim, precision=torch.float64) for place, dim in pairs]

    corner = text_length if pictures_follow_text else 0
    pictures = []
    for number, (frames, rows, columns) in enumerate(grids, start=int(pictures_follow_text)):
        places = torch.arange(frames) + number, torch.arange(rows) + corner, torch.arange(columns) + corner
        pictures.append(make_grid_frequencies(angles(places)))
    still = torch.zeros(text_length)
    diagonal = torch.arange(text_length) if text_is_counted else still
    return torch.cat(pictures).to(device), torch.cat(angles((still, diagonal, diagonal)), dim=-2).to(device)
