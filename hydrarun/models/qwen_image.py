"""Qwen-Image (https://arxiv.org/abs/2508.02324): 60 dual-stream blocks with joint attention over text and image.

The edit models have the same blocks; images to edit are extra latent tokens, each picture a frame of its own. In
the layered model, the whole picture and its layers are frames from 0, and the input picture is frame -1.
Reference: diffusers' `QwenImageTransformer2DModel`, whose checkpoints it loads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, ClassVar

import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor, nn

from hydrarun.core.errors import UsageError
from hydrarun.models.layers.dual_stream import DualStreamBlock, map_dual_stream_weights
from hydrarun.models.layers.norm import AdaLayerNorm
from hydrarun.models.layers.rope import make_frequencies, make_grid_frequencies
from hydrarun.models.layers.tokens import Tokens
from hydrarun.models.transformer import Transformer

Grid = tuple[int, int, int]


class QwenImageTransformer(Transformer):
    """Arguments are the checkpoint's transformer/config.json.

    Raises `UsageError` for switches of model variants that this class does not support.
    """

    block_lists = ("blocks",)
    weight_map: ClassVar[Mapping[str, str | tuple[str, ...]]] = {
        **map_dual_stream_weights(modulation=("img_mod.1", "txt_mod.1"), feed_forward=("img_mlp", "txt_mlp")),
        "time_embed": "time_text_embed.timestep_embedder",
        "norm_out.modulation.linear": "norm_out.linear",
        "kind_embed": "time_text_embed.addition_t_embedding",
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
        refuse_switches(guidance_embeds=guidance_embeds)
        dim = num_attention_heads * attention_head_dim
        self.axes_dims_rope = tuple(axes_dims_rope)
        self.zero_cond_t = zero_cond_t
        self.layered = use_layer3d_rope
        self.time_proj = Timesteps(num_channels=256, flip_sin_to_cos=True, downscale_freq_shift=0, scale=1000)
        self.time_embed = TimestepEmbedding(in_channels=256, time_embed_dim=dim)
        # diffusers' pipeline only uses index 0 of the two
        self.kind_embed = nn.Embedding(2, dim) if use_additional_t_cond else None
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
        grid: Grid,
        image_latents: Tensor | None = None,
        image_grids: tuple[Grid, ...] = (),
    ) -> Tokens:
        """Embed packed latents `[B, S, C]`, timesteps `[B]` in 0-1000, text `[B, T, E]` with its mask `[B, T]`.

        `grid` counts the latent tokens: frames, rows, columns. `image_latents` `[B, I, C]` are the packed images to
        edit, concatenated, and `image_grids` their grids.
        """
        temb = self.make_temb(timestep, hidden_states.dtype, image_latents=image_latents)
        if image_latents is not None:
            hidden_states = torch.cat([hidden_states, image_latents.to(hidden_states.dtype)], dim=1)
        image = self.img_in(hidden_states)
        text = self.txt_in(self.txt_norm(encoder_hidden_states))
        mask = None if encoder_hidden_states_mask is None else encoder_hidden_states_mask.bool()
        return Tokens(image, text, mask, temb=temb, grid=grid)

    def positions(
        self,
        hidden_states: Tensor,
        *,
        encoder_hidden_states: Tensor,
        grid: Grid,
        image_latents: Tensor | None = None,
        image_grids: tuple[Grid, ...] = (),
        **_: Any,
    ) -> dict[str, Any]:
        device = hidden_states.device
        text_length = encoder_hidden_states.shape[1]
        rope, text_rope = make_rope_tables((grid, *image_grids), text_length, self.axes_dims_rope, device, self.layered)
        two_times = self.zero_cond_t and image_latents is not None
        index = make_time_index(grid, image_grids, device) if two_times else None
        return {"rope": rope, "encoder_rope": text_rope, "temb_index": index}

    def make_temb(
        self, timestep: Tensor, dtype: torch.dtype, *, image_latents: Tensor | None = None, **_: Any
    ) -> Tensor:
        """Map timesteps `[B]` to `[B, 1, D]`, or to `[B, 2, D]` if images to edit have the timestep 0."""
        times = timestep[:, None]
        if self.zero_cond_t and image_latents is not None:
            times = torch.cat([times, torch.zeros_like(times)], dim=1)
        # the reference divides by 1000 and multiplies again in the latents' dtype; the rounding matters in bfloat16
        fraction = times.to(dtype) / 1000
        temb = self.time_embed(self.time_proj(fraction.flatten()).to(dtype)).unflatten(0, times.shape)
        return temb if self.kind_embed is None else temb + self.kind_embed.weight[0].to(dtype)

    def head(self, tokens: Tokens) -> Tensor:
        """Map `[B, S, D]` to the velocity `[B, S, C]` of the tokens of `grid`, which come first."""
        predicted = tokens.hidden_states[:, : math.prod(tokens.grid)]
        return self.proj_out(self.norm_out(predicted, tokens.temb[:, :1]))


def refuse_switches(**switches: bool) -> None:
    """Raise `UsageError` that names the switches that are on."""
    on = [name for name, value in switches.items() if value]
    if on:
        raise UsageError(
            f"transformer/config.json sets {', '.join(on)}: this variant of Qwen-Image is not supported (it is"
            " guidance-distilled)"
        )


@lru_cache(maxsize=16)
def make_time_index(grid: Grid, image_grids: tuple[Grid, ...], device: torch.device) -> Tensor:
    """Return each token's timestep index `[S]`: 0 for predicted tokens, then 1 for tokens of the images to edit."""
    lengths = torch.tensor([math.prod(grid), sum(map(math.prod, image_grids))])
    return torch.repeat_interleave(torch.arange(2), lengths).to(device)


@lru_cache(maxsize=16)
def make_rope_tables(
    grids: tuple[Grid, ...], text_length: int, axes_dims: tuple[int, ...], device: torch.device, layered: bool = False
) -> tuple[Tensor, Tensor]:
    """Return rotary tables of all pictures' latent tokens `[S, d / 2, 2]` and of the text tokens `[T, d / 2, 2]`.

    Rows and columns count from the picture's centre, so that sizes share positions. Pictures are numbered as frames.
    Text follows on the diagonal after the largest half side (the paper's MSRoPE). `layered`: pictures after the first
    have number -1, and text starts after the frames too.
    """
    pictures = []
    for number, (frames, height, width) in enumerate(grids):
        positions = (
            torch.arange(frames) + (-1 if layered and number else number),
            torch.arange(height) - (height - height // 2),
            torch.arange(width) - (width - width // 2),
        )
        axes = [make_frequencies(place, dim) for place, dim in zip(positions, axes_dims, strict=True)]
        pictures.append(make_grid_frequencies(axes))
    start = max(side // 2 for _, *sides in grids for side in sides)
    start = max(start, grids[0][0]) if layered else start
    text = torch.cat([make_frequencies(torch.arange(start, start + text_length), dim) for dim in axes_dims], dim=-2)
    return torch.cat(pictures).to(device), text.to(device)
