"""What flows through the blocks: tokens, their positions and masks, and which fields are cut over ranks."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor


def token_field(dim: int, of: str) -> Any:
    """A field whose dimension `dim` counts tokens of the stream `of` (the name of the stream's own field)."""
    return field(default=None, metadata={"token_dim": dim, "of": of})


@dataclass
class Tokens:
    """What flows through the blocks. S latent tokens, T context (text) tokens, D channels, d channels of a head.

    Tokens of one call may be at different noise levels (a given first frame, an image to edit): `temb` then holds K
    timesteps, the first of them the call's own, and `temb_index` says which is each latent token's. A model that needs
    more fields subclasses this.
    """

    hidden_states: Tensor = token_field(1, "hidden_states")  # [B, S, D]
    encoder_hidden_states: Tensor | None = token_field(1, "encoder_hidden_states")  # [B, T, D]
    encoder_mask: Tensor | None = None  # [B, T] bool, True: a real token; whole wherever the tokens are
    rope: Tensor | None = token_field(0, "hidden_states")  # [S, d/2, 2] cosines and sines
    encoder_rope: Tensor | None = token_field(0, "encoder_hidden_states")  # [T, d/2, 2]
    temb: Any = None  # [B, K, D] timesteps and other global conditioning; or [B, K], their rows in modulation tables
    temb_index: Tensor | None = token_field(0, "hidden_states")  # [S] 0 to K - 1; None: K is 1
    grid: tuple[int, int, int] = (1, 1, 1)  # frames, rows and columns of the latent tokens that are predicted

    @classmethod
    def token_dims(cls) -> dict[str, tuple[int, str]]:
        """`{field: (token dimension, stream)}` of every field that is cut when tokens are spread over ranks."""
        return {f.name: (f.metadata["token_dim"], f.metadata["of"]) for f in fields(cls) if "token_dim" in f.metadata}


Grid = tuple[int, int, int]
