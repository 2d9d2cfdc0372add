"""Tokens that pass through the blocks, with positions and masks, and which fields are sharded across ranks."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor


def token_field(dim: int, of: str) -> Any:
    """Declare a field whose dimension `dim` counts tokens of the stream `of` (the name of the stream's own field)."""
    return field(default=None, metadata={"token_dim": dim, "of": of})


@dataclass
class Tokens:
    """Input and state of the blocks: S latent tokens, T context (text) tokens, D channels, d channels per head.

    Tokens of one call may be at different noise levels (a given first frame, an image to edit). `temb` then holds K
    timesteps, the call's own first, and `temb_index` maps each latent token to its timestep. A model that needs more
    fields subclasses this.
    """

    hidden_states: Tensor = token_field(1, "hidden_states")  # [B, S, D]
    encoder_hidden_states: Tensor | None = token_field(1, "encoder_hidden_states")  # [B, T, D]
    encoder_mask: Tensor | None = None  # [B, T] bool, True: a real token; never sharded
    rope: Tensor | None = token_field(0, "hidden_states")  # [S, d/2, 2] cosines and sines
    encoder_rope: Tensor | None = token_field(0, "encoder_hidden_states")  # [T, d/2, 2]
    temb: Any = None  # [B, K, D] timesteps and other global conditioning; or [B, K], rows in modulation tables
    temb_index: Tensor | None = token_field(0, "hidden_states")  # [S] 0 to K - 1; None: K is 1
    grid: tuple[int, int, int] = (1, 1, 1)  # frames, rows and columns of the predicted latent tokens

    @classmethod
    def token_dims(cls) -> dict[str, tuple[int, str]]:
        """Return `{field: (token dimension, stream)}` of every field that is sharded with the tokens."""
        return {f.name: (f.metadata["token_dim"], f.metadata["of"]) for f in fields(cls) if "token_dim" in f.metadata}


Grid = tuple[int, int, int]
