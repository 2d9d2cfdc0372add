"""The demo transformer, and a training forward that equals diffusers' but is faster on a CPU.

The fast forward rotates with real instead of complex numbers, fuses the three projections of a stream, computes values
that depend on the noise level once per picture, and is one compiled function for all blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import QwenImageTransformer2DModel
from torch import nn

LAYERS, HEADS, HEAD_DIM, ROPE_AXES = 6, 4, 32, (8, 12, 12)
GRID = 8  # image tokens per side: 128 pixels, 8 per latent cell, 2 cells per token
EPSILON = 1e-6

Block = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def make_transformer(z_dim: int, text_dim: int) -> QwenImageTransformer2DModel:
    """Build an untrained transformer whose blocks are the identity and which predicts zero."""
    model = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=4 * z_dim,
        out_channels=z_dim,
        num_layers=LAYERS,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=text_dim,
        guidance_embeds=False,
        axes_dims_rope=ROPE_AXES,
    )
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            nn.init.xavier_uniform_(parameter)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    starts_at_zero = [model.norm_out.linear, model.proj_out]
    for block in model.transformer_blocks:
        starts_at_zero += [block.img_mod[1], block.txt_mod[1]]
    for layer in starts_at_zero:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    for layer in (model.time_text_embed.timestep_embedder.linear_1, model.time_text_embed.timestep_embedder.linear_2):
        nn.init.normal_(layer.weight, std=0.02)
    # The text output of the last block is never used.
    for layer in (model.transformer_blocks[-1].attn.to_add_out, model.transformer_blocks[-1].txt_mlp):
        layer.requires_grad_(False)
    return model


def rotation_tables(model: QwenImageTransformer2DModel, text_tokens: int) -> tuple[torch.Tensor, ...]:
    """Return cosines and sines for the 8x8 picture and for the text: 4 tensors [tokens, 1, head_dim / 2]."""
    device = next(model.parameters()).device
    tables = model.pos_embed([[(1, GRID, GRID)]], max_txt_seq_len=text_tokens, device=device)
    image, text = (table.unsqueeze(1) for table in tables)
    return tuple(t.float().contiguous() for t in (image.real, image.imag, text.real, text.imag))


def _modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=EPSILON) * (1 + scale) + shift


def _rotated(x: torch.Tensor, weight: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Apply RMS norm and rotary embedding in fp32: [n, tokens, heads, head_dim] -> the same in x's dtype."""
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + EPSILON) * weight
    even, odd = y.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], -1).flatten(-2).to(x.dtype)


def stream_weights(block: nn.Module) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """Return the weights of a block's image and text stream, each in the order that `joint_block` expects."""
    attn = block.attn
    image = (attn.to_q, attn.to_k, attn.to_v, attn.to_out[0], attn.norm_q, attn.norm_k, block.img_mod[1], block.img_mlp)
    text = (
        attn.add_q_proj, attn.add_k_proj, attn.add_v_proj, attn.to_add_out, attn.norm_added_q, attn.norm_added_k,
        block.txt_mod[1], block.txt_mlp,
    )  # fmt: skip
    return _flat(*image), _flat(*text)


def _flat(q: Any, k: Any, v: Any, out: Any, norm_q: Any, norm_k: Any, mod: Any, mlp: Any) -> tuple[torch.Tensor, ...]:
    up, down = mlp.net[0].proj, mlp.net[2]
    return (
        torch.cat([q.weight, k.weight, v.weight]), torch.cat([q.bias, k.bias, v.bias]), norm_q.weight, norm_k.weight,
        mod.weight, mod.bias, out.weight, out.bias, up.weight, up.bias, down.weight, down.bias,
    )  # fmt: skip


def joint_block(
    image: torch.Tensor,
    text: torch.Tensor,
    condition: torch.Tensor,
    mask: torch.Tensor,
    tables: tuple[torch.Tensor, ...],
    weights: tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run a dual-stream block: image [n, i, d], text [n, t, d] -> the same.

    `condition` is SiLU of the time embedding [n, d]; `mask` bool [n, 1, 1, t + i], True where a key may be attended to.
    """
    streams = []
    for x, w, cosine, sine in ((text, weights[1], *tables[2:]), (image, weights[0], *tables[:2])):
        modulation = F.linear(condition, w[4], w[5]).unsqueeze(1).chunk(6, -1)
        projected = F.linear(_modulate(x, modulation[0], modulation[1]), w[0], w[1])
        q, k, v = projected.unflatten(-1, (3, HEADS, -1)).unbind(2)
        streams.append((x, w, modulation, _rotated(q, w[2], cosine, sine), _rotated(k, w[3], cosine, sine), v))
    q, k, v = (torch.cat([s[j] for s in streams], dim=1).transpose(1, 2) for j in (3, 4, 5))
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
    outputs = []
    for (x, w, modulation, *_), part in zip(streams, attended.split([text.shape[1], image.shape[1]], 1), strict=True):
        x = x + modulation[2] * F.linear(part, w[6], w[7])
        hidden = F.gelu(F.linear(_modulate(x, modulation[3], modulation[4]), w[8], w[9]), approximate="tanh")
        outputs.append(x + modulation[5] * F.linear(hidden, w[10], w[11]))
    return outputs[1], outputs[0]


def predict(
    model: QwenImageTransformer2DModel,
    noisy: torch.Tensor,
    text: torch.Tensor,
    text_mask: torch.Tensor,
    sigma: torch.Tensor,
    tables: tuple[torch.Tensor, ...],
    block: Block = joint_block,
) -> torch.Tensor:
    """Predict the velocity, shaped like noisy [n, 64, 4 z]; text [n, t, text_dim], text_mask bool [n, t], sigma [n]."""
    context = model.txt_in(model.txt_norm(text))
    x = model.img_in(noisy)
    time = model.time_text_embed(sigma, x.float())
    condition = F.silu(time)
    mask = F.pad(text_mask, (0, noisy.shape[1]), value=True)[:, None, None, :]
    for layer in model.transformer_blocks:
        x, context = block(x, context, condition, mask, tables, stream_weights(layer))
    return model.proj_out(model.norm_out(x, time))


@torch.no_grad()
def check_against_diffusers(z_dim: int, text_dim: int, text_tokens: int) -> float:
    """Return the largest relative difference of `predict` from the model's own forward with random weights, in fp32."""
    generator = torch.Generator().manual_seed(0)
    model = make_transformer(z_dim, text_dim).float().eval()
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    noisy = torch.randn(3, GRID * GRID, 4 * z_dim, generator=generator)
    text = torch.randn(3, text_tokens, text_dim, generator=generator)
    mask = torch.arange(text_tokens)[None] < torch.tensor([[text_tokens], [text_tokens // 2], [5]])
    sigma = torch.tensor([0.1, 0.5, 0.9])
    quick = predict(model, noisy, text, mask, sigma, rotation_tables(model, text_tokens))
    reference = model(
        noisy,
        encoder_hidden_states=text,
        encoder_hidden_states_mask=mask,
        timestep=sigma,
        img_shapes=[[(1, GRID, GRID)]] * 3,
        return_dict=False,
    )[0]
    return float((quick - reference).abs().max() / reference.abs().max())
