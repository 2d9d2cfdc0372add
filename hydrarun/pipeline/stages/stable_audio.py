"""Stable Audio's own stages: diffusers' pipeline without a transformer, and prompts with start and end seconds."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from hydrarun.pipeline.stage import Components
from hydrarun.pipeline.stages.encode import EncodePrompt
from hydrarun.pipeline.stages.sound import find_sound_span
from hydrarun.pipeline.state import State


class StableAudioPipeline(diffusers.StableAudioPipeline):
    """diffusers' pipeline without a transformer, from which diffusers' constructor reads the width of a head."""

    def __init__(
        self, vae: Any, text_encoder: Any, projection_model: Any, tokenizer: Any, transformer: Any, scheduler: Any
    ) -> None:
        diffusers.DiffusionPipeline.__init__(self)
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            projection_model=projection_model,
            tokenizer=tokenizer,
            transformer=transformer,
            scheduler=scheduler,
        )


class EncodePromptAndSeconds(EncodePrompt):
    """Encodes prompts and appends two tokens: the seconds at which the sound starts and ends.

    The transformer also takes these two as `global_hidden_states`.
    """

    needs = (*EncodePrompt.needs, "audio_start_in_s", "audio_end_in_s")

    def __init__(self) -> None:
        super().__init__(returns=(), arguments={"do_classifier_free_guidance": False})

    def encode(self, prompts: list[str], state: State, parts: Components) -> dict[str, Any]:
        text = parts.pipeline.encode_prompt(prompt=prompts, device=parts.device, **self.arguments)
        seconds = parts.pipeline.encode_duration(*find_sound_span(state, parts), parts.device, False, len(prompts))
        return {
            "encoder_hidden_states": torch.cat([text, *seconds], dim=1),
            "global_hidden_states": torch.cat(seconds, dim=2),
        }
