"""Z-Image (https://arxiv.org/abs/2511.22699): 30 single-stream blocks over image and caption.

Reference: diffusers' `ZImageTransformer2DModel`, whose checkpoints it loads. 2 refiner blocks process image and caption
separately first. Each picture and each caption is padded to a multiple of 32 tokens with a learned token, which is
attended to like all others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from diffusers.models.embeddings import Timesteps
from torch import Tensor, nn
from torch.nn import functional as F

from hydrarun.core.errors import UsageError
from hydrarun.models.layers.attention import Attention
from hydrarun.models.layers.linear import FeedForward, QKVLinear, RowParallelLinear
from hydrarun.models.layers.norm import Modulation
from hydrarun.models.layers.rope import apply_rope, make_frequencies, make_grid_frequencies
from hydrarun.models.layers.tensor_parallel import ShardSpec
from hydrarun.models.layers.tokens import Tokens, token_field
from hydrarun.models.transformer import Transformer

#: pictures and captions are padded to a multiple of this number of tokens
MULTIPLE = 32
#: channels of the timestep embedding, unless the model's `dim` is smaller
TEMB_WIDTH = 256
PATCH = 2


@dataclass
class ZImageTokens(Tokens):
    """Tokens with positions per item: a picture follows its caption, and caption lengths differ."""

    rope: Tensor | None = token_field(1, "hidden_states")  # [B, S, d/2, 2]
    encoder_rope: Tensor | None = token_field(1, "encoder_hidden_states")  # [B, T, d/2, 2]


class ZImageLayer(nn.Module):
    """Attention and feed-forward, each between two norms, with shared weights for all streams."""

    def __init__(self, dim: int, heads: int, eps: float) -> None:
        super().__init__()
        head_dim = dim // heads
        self.qkv = QKVLinear(dim, heads, head_dim, bias=False)
        self.norm_q, self.norm_k = (nn.RMSNorm(head_dim, eps=1e-5) for _ in range(2))
        self.attention = Attention()
        self.out = RowParallelLinear(dim, ShardSpec(heads, head_dim), bias=False)
        self.feed_forward = FeedForward(dim, int(dim / 3 * 8), gated=True, bias=False)
        self.attention_norm1, self.attention_norm2 = (nn.RMSNorm(dim, eps=eps) for _ in range(2))
        self.ffn_norm1, self.ffn_norm2 = (nn.RMSNorm(dim, eps=eps) for _ in range(2))

    def forward(
        self, streams: Mapping[str, Tensor], ropes: Sequence[Tensor], mask: Tensor | None, changes: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """Map `[B, S, D]` of each stream to the same shape. `ropes`: one per stream; `mask`: of the text, if present.

        `changes`, `[B, 1, D]` or broadcast to it: scale and gate of the attention, then of the feed-forward.
        """
        lengths = [stream.shape[1] for stream in streams.values()]
        scale, gate, ff_scale, ff_gate = changes
        tokens, rope = torch.cat([*streams.values()], dim=1), torch.cat([*ropes], dim=1)
        query, key, value = self.qkv(self.attention_norm1(tokens) * scale)
        query, key = apply_rope(self.norm_q(query), rope), apply_rope(self.norm_k(key), rope)
        parts = zip(*(x.split(lengths, dim=1) for x in (query, key, value)), strict=True)
        masks = {} if mask is None else {"encoder_hidden_states": mask}
        attended = torch.cat(self.attention(dict(zip(streams, parts, strict=True)), masks), dim=1)
        tokens = torch.addcmul(tokens, gate, self.attention_norm2(self.out(attended)))
        update = self.ffn_norm2(self.feed_forward(self.ffn_norm1(tokens) * ff_scale))
        return torch.addcmul(tokens, ff_gate, update).split(lengths, dim=1)


class ZImageBlock(nn.Module):
    """A block over image and text together."""

    def __init__(self, dim: int, heads: int, eps: float) -> None:
        super().__init__()
        self.modulation = Modulation(dim, parts=4, width=min(dim, TEMB_WIDTH), activated=False)
        self.layer = ZImageLayer(dim, heads, eps)

    def changes(self, tokens: Tokens) -> tuple[Tensor, ...]:
        """Return scale and gate of the attention, then of the feed-forward, `[B, 1, D]` each."""
        scale, gate, ff_scale, ff_gate = self.modulation(tokens.temb)
        return 1 + scale, gate.tanh(), 1 + ff_scale, ff_gate.tanh()

    def modulated(self, tokens: Tokens) -> Tensor:
        """Return the image tokens as the attention projection sees them, `[B, S, D]`."""
        return self.layer.attention_norm1(tokens.hidden_states) * self.changes(tokens)[0]

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, tokens: Any) -> tuple[Tensor, ...]:
        """Map `[B, S, D]` and `[B, T, D]` to the same shapes."""
        streams = {"hidden_states": hidden_states, "encoder_hidden_states": encoder_hidden_states}
        ropes = tokens.rope, tokens.encoder_rope
        return self.layer(streams, ropes, tokens.encoder_mask, self.changes(tokens))


class RefinerBlock(ZImageBlock):
    """A block over image and text separately, before they are joined; only the image is modulated."""

    def __init__(self, dim: int, heads: int, eps: float) -> None:
        super().__init__(dim, heads, eps)
        self.text_layer = ZImageLayer(dim, heads, eps)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, tokens: Any) -> tuple[Tensor, ...]:
        """Map `[B, S, D]` and `[B, T, D]` to the same shapes."""
        as_they_are = (encoder_hidden_states.new_ones(1),) * 4
        text = {"encoder_hidden_states": encoder_hidden_states}
        return (
            *self.layer({"hidden_states": hidden_states}, [tokens.rope], None, self.changes(tokens)),
            *self.text_layer(text, [tokens.encoder_rope], tokens.encoder_mask, as_they_are),
        )


def map_layer_weights(ours: str, theirs: str) -> dict[str, str | tuple[str, ...]]:
    """Return the weight map of a `ZImageLayer`."""
    norms = ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2")
    return {
        f"{ours}.qkv": tuple(f"{theirs}.attention.{name}" for name in ("to_q", "to_k", "to_v")),
        f"{ours}.norm_q": f"{theirs}.attention.norm_q",
        f"{ours}.norm_k": f"{theirs}.attention.norm_k",
        f"{ours}.out": f"{theirs}.attention.to_out.0",
        f"{ours}.feed_forward.up": (f"{theirs}.feed_forward.w3", f"{theirs}.feed_forward.w1"),
        f"{ours}.feed_forward.down": f"{theirs}.feed_forward.w2",
        **{f"{ours}.{name}": f"{theirs}.{name}" for name in norms},
    }


class ZImageTransformer(Transformer):
    """Arguments are the checkpoint's transformer/config.json.

    Raises `UsageError` for model variants that this class does not support. `axes_lens` sizes the reference's rotary
    tables; ours are as long as the picture needs.
    """

    block_lists = ("refiners", "blocks")
    weight_map: ClassVar[Mapping[str, str | tuple[str, ...]]] = {
        **map_layer_weights("refiners.*.layer", "noise_refiner.*"),
        **map_layer_weights("refiners.*.text_layer", "context_refiner.*"),
        **map_layer_weights("blocks.*.layer", "layers.*"),
        "refiners.*.modulation.linear": "noise_refiner.*.adaLN_modulation.0",
        "blocks.*.modulation.linear": "layers.*.adaLN_modulation.0",
        "time_embedder": "t_embedder.mlp",
        "x_embedder": "all_x_embedder.2-1",
        "head_modulation.linear": "all_final_layer.2-1.adaLN_modulation.1",
        "proj_out": "all_final_layer.2-1.linear",
    }

    def __init__(
        self,
        all_patch_size: Sequence[int] = (PATCH,),
        all_f_patch_size: Sequence[int] = (1,),
        in_channels: int = 16,
        dim: int = 3840,
        n_layers: int = 30,
        n_refiner_layers: int = 2,
        n_heads: int = 30,
        n_kv_heads: int = 30,
        norm_eps: float = 1e-5,
        qk_norm: bool = True,
        cap_feat_dim: int = 2560,
        siglip_feat_dim: int | None = None,
        rope_theta: float = 256.0,
        t_scale: float = 1000.0,
        axes_dims: Sequence[int] = (32, 48, 48),
        axes_lens: Sequence[int] = (1024, 512, 512),
    ) -> None:
        super().__init__()
        refuse_variants(
            all_patch_size=(list(all_patch_size), [PATCH]),
            all_f_patch_size=(list(all_f_patch_size), [1]),
            n_kv_heads=(n_kv_heads, n_heads),
            qk_norm=(qk_norm, True),
            siglip_feat_dim=(siglip_feat_dim, None),
        )
        width = min(dim, TEMB_WIDTH)
        self.axes_dims, self.rope_theta, self.t_scale = tuple(axes_dims), rope_theta, t_scale
        self.time_proj = Timesteps(num_channels=256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedder = nn.Sequential(nn.Linear(256, 1024), nn.SiLU(), nn.Linear(1024, width))
        self.x_embedder = nn.Linear(PATCH * PATCH * in_channels, dim)
        self.cap_embedder = nn.Sequential(nn.RMSNorm(cap_feat_dim, eps=norm_eps), nn.Linear(cap_feat_dim, dim))
        self.x_pad_token, self.cap_pad_token = (nn.Parameter(torch.empty(1, dim)) for _ in range(2))
        self.refiners = nn.ModuleList(RefinerBlock(dim, n_heads, norm_eps) for _ in range(n_refiner_layers))
        self.blocks = nn.ModuleList(ZImageBlock(dim, n_heads, norm_eps) for _ in range(n_layers))
        self.head_modulation = Modulation(dim, parts=1, width=width)
        self.proj_out = nn.Linear(dim, PATCH * PATCH * in_channels)

    def embed(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        *,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor | None,
    ) -> ZImageTokens:
        """Embed latents `[B, C, 1, h, w]`, timesteps `[B]` in 0-1000, text `[B, T, E]` with its mask `[B, T]`."""
        patches = hidden_states.squeeze(2).unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH))  # [B, C, rows, P, …]
        image = self.x_embedder(patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2))
        missing = round_up_length(image.shape[1]) - image.shape[1]
        image = torch.cat([image, self.x_pad_token.expand(len(image), missing, -1)], dim=1)
        length = encoder_hidden_states.shape[1]
        text = F.pad(self.cap_embedder(encoder_hidden_states), (0, 0, 0, round_up_length(length) - length))
        place = torch.arange(text.shape[1], device=text.device)
        lengths = count_caption_tokens(encoder_hidden_states, encoder_hidden_states_mask)[:, None]
        return ZImageTokens(
            hidden_states=image,
            encoder_hidden_states=torch.where((place < lengths).unsqueeze(-1), text, self.cap_pad_token),
            encoder_mask=None if encoder_hidden_states_mask is None else place < round_up_length(lengths),
            temb=self.make_temb(timestep, hidden_states.dtype),
            grid=(1, patches.shape[2], patches.shape[4]),
        )

    def positions(
        self,
        hidden_states: Tensor,
        *,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor | None,
        **_: Any,
    ) -> dict[str, Any]:
        rows, columns = (side // PATCH for side in hidden_states.shape[3:])
        text_length, device = round_up_length(encoder_hidden_states.shape[1]), hidden_states.device
        frames, grid, text = make_rope_tables((rows, columns), text_length, self.axes_dims, self.rope_theta, device)
        lengths = count_caption_tokens(encoder_hidden_states, encoder_hidden_states_mask)
        # [B, 1, f/2, 2]: all tokens of a picture have the frame position after its caption
        frame = frames[round_up_length(lengths)].unsqueeze(1)
        rope = torch.cat([frame.expand(-1, rows * columns, -1, -1), grid.expand(len(lengths), -1, -1, -1)], dim=2)
        still = text.new_tensor([1.0, 0.0]).expand(
            len(lengths), round_up_length(rows * columns) - rows * columns, *text.shape[1:]
        )
        return {
            "rope": torch.cat([rope, still], dim=1),
            "encoder_rope": text.expand(len(lengths), -1, -1, -1),
        }

    def make_temb(self, timestep: Tensor, dtype: torch.dtype, **_: Any) -> Tensor:
        """Map timesteps `[B]` to `[B, 1, 256]`. The model counts time backwards; it is computed in float32."""
        waves = self.time_proj((1000 - timestep.float()) / 1000 * self.t_scale)
        return self.time_embedder(waves.to(dtype)).unsqueeze(1)

    def head(self, tokens: Tokens) -> Tensor:
        """Map `[B, S, D]` to the velocity `[B, C, 1, h, w]`, in float32 like the reference's guidance and scheduler.

        The sign is flipped: the model predicts the direction to the picture, schedulers expect the one to the noise.
        """
        _, rows, columns = tokens.grid
        (scale,) = self.head_modulation(tokens.temb)
        predicted = tokens.hidden_states[:, : rows * columns]
        normed = F.layer_norm(predicted, predicted.shape[-1:], eps=1e-6) * (1 + scale)
        patches = self.proj_out(normed).unflatten(-1, (PATCH, PATCH, -1)).unflatten(1, (rows, columns))
        latents = patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
        return -latents.unsqueeze(2).float()


def refuse_variants(**settings: tuple[Any, Any]) -> None:
    """Raise `UsageError` that names the settings that differ from the published models."""
    others = [f"{name}={found} (not {wanted})" for name, (found, wanted) in settings.items() if found != wanted]
    if others:
        raise UsageError(f"transformer/config.json: {', '.join(others)}: this model variant is not supported")


def round_up_length(length: Any) -> Any:
    """Round a number of tokens, or a tensor of numbers, up to a multiple of `MULTIPLE`."""
    return (length + MULTIPLE - 1) // MULTIPLE * MULTIPLE


def count_caption_tokens(text: Tensor, mask: Tensor | None) -> Tensor:
    """Count the tokens of each caption in `[B, T, E]`; returns `[B]`."""
    if mask is None:
        return torch.full((len(text),), text.shape[1], device=text.device)
    return mask.sum(1)


@lru_cache(maxsize=16)
def make_rope_tables(
    grid: tuple[int, int], text_length: int, axes_dims: tuple[int, ...], theta: float, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Return three rotary tables.

    - First axis, for a token after n text tokens: `[text_length + 1, f / 2, 2]`, indexed by n.
    - Other axes, for image tokens: `[rows * columns, (h + w) / 2, 2]`.
    - All axes, for text tokens: `[text_length, d / 2, 2]`, with positions along the first axis only.

    Text positions count from 1. Padding in a picture is not rotated.
    """
    along, *others = axes_dims
    first = make_frequencies(torch.arange(1, text_length + 2), along, theta, torch.float64)
    axes = [
        make_frequencies(torch.arange(n), dim, theta, torch.float64)
        for n, dim in zip((1, *grid), (0, *others), strict=True)
    ]
    still = make_frequencies(torch.zeros(text_length), sum(others))
    text = torch.cat([first[:-1], still], dim=1)
    return first.to(device), make_grid_frequencies(axes).to(device), text.to(device)
