"""LongCat-Image's own stages: diffusers' pipelines with the usual `encode_prompt`, and prompts of edits."""

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
from hydrarun.pipeline.truncation import ReadPrompt


class EncoderDevice:
    """Sets a pipeline's device to the text encoder's: the default, its first component's, may be another."""

    @property
    def device(self) -> torch.device:
        """The device on which prompts are encoded."""
        return self.text_encoder.device  # type: ignore[attr-defined]


def tokenize_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Return the token ids of a prompt: each quoted character is tokenized alone."""
    pieces = [piece for part, quoted in split_quotation(prompt) for piece in (part if quoted else [part])]
    return [token for piece in pieces for token in tokenizer(piece, add_special_tokens=False)["input_ids"]]


class LongCatImagePipeline(EncoderDevice, diffusers.LongCatImagePipeline):
    """diffusers' pipeline, with an `encode_prompt` that takes the usual arguments."""

    def read_prompt(self, prompt: str) -> ReadPrompt:
        """Return what is read of a prompt: diffusers' own method cuts the tokens."""
        tokens, limit = tokenize_prompt(self.tokenizer, prompt), self.tokenizer_max_length
        return ReadPrompt(
            "tokenizer", len(tokens), min(len(tokens), limit), self.tokenizer.decode(tokens[limit:]).strip()
        )

    def encode_prompt(self, prompt: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
        """Return embeddings `[N, 512, D]` on `device`, which must be the encoder's, and positions."""
        return super().encode_prompt(prompt)


class LongCatImageEditPipeline(EncoderDevice, diffusers.LongCatImageEditPipeline):
    """diffusers' pipeline, with an `encode_prompt` that takes the usual arguments."""

    def encode_prompt(self, prompt: list[str], image: Image.Image, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return embeddings `[1, I + 512, D]` of one prompt on `device`, which must be the encoder's, and positions.

        Raises `UsageError` for a prompt that is too long, with which diffusers' own method fails.
        """
        count = len(tokenize_prompt(self.tokenizer, prompt[0]))
        if count > self.tokenizer_max_length:
            raise UsageError(
                f"the prompt {prompt[0][:60]!r} has {count} tokens, and this model takes {self.tokenizer_max_length};"
                " quoted text takes at least one token per character"
            )
        return super().encode_prompt(prompt, image)


class EncodePromptWithImages(EncodePrompt):
    """Encodes one prompt at a time with the input image, which is resized to the output's size and then halved."""

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
