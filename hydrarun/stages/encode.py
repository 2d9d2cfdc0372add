"""Prompts to conditioning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hydrarun.errors import UsageError
from hydrarun.guidance import NEGATIVE, POSITIVE
from hydrarun.pipeline import Parts, Stage
from hydrarun.state import State
from hydrarun.timing import Timings


class EncodePrompt(Stage):
    """Runs the pipeline's own `encode_prompt` on the prompts of every branch that guidance asks for.

    `returns` names, as arguments of the transformer's `embed`, what `encode_prompt` returns. Equal prompts are encoded
    once and repeated here: the reference pipelines repeat masks in the wrong order.
    """

    needs = ("prompts", "negative_prompts", "true_cfg_scale", "max_sequence_length")
    gives = ("conditioning",)
    phase = "encode"

    def __init__(self, returns: Sequence[str]) -> None:
        self.returns = tuple(returns)

    def __call__(self, state: State, parts: Parts, timings: Timings) -> None:
        texts = {POSITIVE: state.prompts, NEGATIVE: state.negative_prompts}
        state.conditioning = {}
        for branch in parts.guidance.branches(state.true_cfg_scale):
            prompts = texts[branch]
            if prompts is None:
                raise UsageError(
                    f"sampling.true_cfg_scale={state.true_cfg_scale} guides away from a negative prompt and there is"
                    ' none: sampling.negative_prompt=" ", or sampling.true_cfg_scale=1'
                )
            state.conditioning[branch] = self.encode(prompts, state, parts)

    def encode(self, prompts: list[str], state: State, parts: Parts) -> dict[str, Any]:
        """Conditioning with one row per item."""
        unique = list(dict.fromkeys(prompts))
        encoded = parts.pipeline.encode_prompt(
            prompt=unique, device=parts.device, max_sequence_length=state.max_sequence_length
        )
        rows = torch.tensor([unique.index(prompt) for prompt in prompts], device=parts.device)
        return {
            name: None if value is None else value.index_select(0, rows)
            for name, value in zip(self.returns, encoded, strict=True)
        }
