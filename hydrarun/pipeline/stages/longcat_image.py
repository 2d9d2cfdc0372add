"""LongCat-Image's own stages: diffusers' pipelines with `encode_prompt` as others have it, and edits' prompts."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.pipelines.longcat_image.pipeline_longcat_image import split_quotation
from PIL import Image
from torch import Tensor

from hydrarun.core.errors import UsageError
from hydrarun.pipeline.stage import Components
from hydrarun.pipeline.stages.encode import EncodePrompt, refuse_placeholder
from hydrarun.pipeline.state import State


class EncoderDevice:
    """The pipelines encode prompts on the device of their first component, and the VAE may be elsewhere."""

    @property
    def device(self) -> torch.device:
        """Where prompts are encoded."""
        return self.text_encoder.device  # type: ignore[attr-defined]


class LongCatImagePipeline(EncoderDevice, diffusers.LongCatImagePipeline):
    """As diffusers', with an `encode_prompt` that is called as others' are."""

    def encode_prompt(self, prompt: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
        """Embeddings `[N, 512, D]` on `device`, which must be the encoder's, and positions."""
        return super().encode_prompt(prompt)


class LongCatImageEditPipeline(EncoderDevice, diffusers.LongCatImageEditPipeline):
    """As diffusers', with an `encode_prompt` that is called as others' are."""

    def encode_prompt(self, prompt: list[str], image: Image.Image, device: torch.device) -> tuple[Tensor, Tensor]:
        """Embeddings `[1, I + 512, D]` on `device`, which must be the encoder's, and positions; of one prompt.

        Raises `UsageError` for a longer one, at which diffusers' own stumbles.
        """
        parts = split_quotation(prompt[0])
        pieces = [piece for part, quoted in parts for piece in (part if quoted else [part])]
        count = sum(len(self.tokenizer(piece, add_special_tokens=False)["input_ids"]) for piece in pieces)
        if count > self.tokenizer_max_length:
            raise UsageError(
                f"the prompt {prompt[0][:60]!r} has {count} tokens, and this model takes {self.tokenizer_max_length};"
                " quoted text has one for each character at least"
            )
        return super().encode_prompt(prompt, image)


class EncodePromptWithImages(EncodePrompt):
    """The text encoder sees the input image too, drawn at the picture's size and halved. One prompt at a time."""

    needs = (*EncodePrompt.needs, "input_images", "height", "width")

    def __init__(self) -> None:
        super().__init__(returns=("encoder_hidden_states", None))

    def encode(self, prompts: list[str], state: State, parts: Components) -> dict[str, Any]:
        refuse_placeholder(prompts, parts.pipeline.image_token)
        resize = parts.pipeline.image_processor.resize
        drawn = resize(state.input_images[0], state.height, state.width)
        image = resize(drawn, state.height // 2, state.width // 2)
        embeds = [self.run(parts, prompt=[prompt], image=image)["encoder_hidden_states"] for prompt in prompts]
        return {"encoder_hidden_states": torch.cat(embeds)}
