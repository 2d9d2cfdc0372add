"""Prompts to conditioning, where a blank prompt is one that the text encoder writes about the input image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hydrarun.core.distributed import collectives
from hydrarun.core.quoting import make_printable
from hydrarun.models.transformer import POSITIVE
from hydrarun.pipeline.stage import Components
from hydrarun.pipeline.stages.encode import EncodePrompt
from hydrarun.pipeline.state import State


class EncodePromptOrCaption(EncodePrompt):
    """Runs the pipeline's `get_image_caption` on the first input image, as large as it is drawn, for blank prompts.

    `english`: the caption's language; else it is Chinese. It is said, and kept in the state.
    """

    needs: tuple[str, ...] = (*EncodePrompt.needs, "input_images", "height", "width", "captioned")
    gives = (*EncodePrompt.gives, "caption")

    def __init__(self, returns: Sequence[str | None], english: bool = True) -> None:
        super().__init__(returns)
        self.english = english

    def texts(self, state: State, parts: Components) -> dict[str, Any]:
        if state.captioned:  # every rank writes it, whose prompts are blank or not: they lend each other weights
            state.caption = self.caption(state, parts)
            said = make_printable(state.caption, len(state.caption))
            parts.progress.note(f"the prompt is blank; the input image's caption: {said}")
        found = super().texts(state, parts)
        return {**found, POSITIVE: [text if text.strip() else state.caption for text in state.prompts]}

    def caption(self, state: State, parts: Components) -> str:
        """The same for the same image: where the checkpoint has words chosen by chance, chance is."""
        pipeline = parts.pipeline
        image = pipeline.image_processor.resize(state.input_images[0], state.height, state.width)
        devices = [parts.device] if parts.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(0)
            text = pipeline.get_image_caption(image, use_en_prompt=self.english, device=parts.device)
        # a last bit may turn a word, and ranks with unequal texts would not fit together
        return collectives.broadcast_text(text, parts.device) if parts.mesh else text
