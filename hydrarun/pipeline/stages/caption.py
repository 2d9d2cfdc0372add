"""Encodes prompts; the text encoder replaces a blank prompt with a caption of the input image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hydrarun.core.distributed import collectives
from hydrarun.core.printable import make_printable
from hydrarun.models.transformer import POSITIVE
from hydrarun.pipeline.stage import Components
from hydrarun.pipeline.stages.encode import EncodePrompt
from hydrarun.pipeline.state import State


class EncodePromptOrCaption(EncodePrompt):
    """Replaces blank prompts with the pipeline's `get_image_caption` of the first input image at the output's size.

    `english`: whether the caption is English or Chinese. It is shown to the user and kept in the state.
    """

    needs: tuple[str, ...] = (*EncodePrompt.needs, "input_images", "height", "width", "captioned")
    gives = (*EncodePrompt.gives, "caption")

    def __init__(self, returns: Sequence[str | None], english: bool = True) -> None:
        super().__init__(returns)
        self.english = english

    def texts(self, state: State, parts: Components) -> dict[str, Any]:
        if state.captioned:  # by every rank, even if its prompts are not blank: HSDP gathers weights from all
            state.caption = self.caption(state, parts)
            said = make_printable(state.caption)
            parts.progress.note(f"the prompt is blank; the input image's caption: {said}")
        found = super().texts(state, parts)
        return {**found, POSITIVE: [text if text.strip() else state.caption for text in state.prompts]}

    def caption(self, state: State, parts: Components) -> str:
        """Return the image's caption. A fixed seed makes it reproducible if the checkpoint's settings sample tokens."""
        pipeline = parts.pipeline
        image = pipeline.image_processor.resize(state.input_images[0], state.height, state.width)
        devices = [parts.device] if parts.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(0)
            text = pipeline.get_image_caption(image, use_en_prompt=self.english, device=parts.device)
        # rounding may change a word, and ranks with different texts would have different shapes
        return collectives.broadcast_text(text, parts.device) if parts.mesh else text
