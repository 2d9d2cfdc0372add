"""Packs latents `[N, C, F, h, w]` into tokens `[N, S, P * P * C]`, with patches of P x P latent pixels, and unpacks."""

from __future__ import annotations

from torch import Tensor


def pack_latents(latents: Tensor, patch: int) -> Tensor:
    """Pack each patch's pixels into one token's channels: C slowest, then the patch's rows and columns."""
    patches = latents.unflatten(4, (-1, patch)).unflatten(3, (-1, patch))  # [N, C, F, rows, P, columns, P]
    return patches.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(1, 3)


def unpack_latents(tokens: Tensor, grid: tuple[int, int, int], patch: int) -> Tensor:
    """Invert `pack_latents`; `grid` counts the tokens: frames, rows, columns."""
    patches = tokens.unflatten(1, grid).unflatten(4, (-1, patch, patch))  # [N, F, rows, columns, C, P, P]
    return patches.permute(0, 4, 1, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)
