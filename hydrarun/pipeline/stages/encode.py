"""Encodes prompts to conditioning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hydrarun.core.errors import UsageError
from hydrarun.core.timing import Timings
from hydrarun.models.transformer import NEGATIVE, POSITIVE
from hydrarun.pipeline.stage import Components, Stage
from hydrarun.pipeline.stages.images import fit_area
from hydrarun.pipeline.state import State
from hydrarun.pipeline.truncation import describe_cut, find_cuts, refuse_lost_words, watch_tokenizers


class EncodePrompt(Stage):
    """Runs the pipeline's own `encode_prompt` on the prompts of every branch that guidance uses.

    `returns` names the results of `encode_prompt` as arguments of the transformer's `embed`; null: not used.
    `arguments` are additional arguments of `encode_prompt`. Equal prompts are encoded once and repeated here, because
    the reference pipelines repeat masks in the wrong order.
    """

    needs: tuple[str, ...] = ("prompts", "negative_prompts", "true_cfg_scale", "guidance_scale", "max_sequence_length")
    gives: tuple[str, ...] = ("conditioning",)
    phase = "encode"
    uses = ("text_encoder",)

    def __init__(self, returns: Sequence[str | None], arguments: Mapping[str, Any] | None = None) -> None:
        self.returns = tuple(returns)
        self.arguments = dict(arguments or {})

    def __call__(self, state: State, parts: Components, timings: Timings) -> None:
        texts = self.texts(state, parts)
        state.conditioning = {}
        for branch in parts.guidance.branches(state):
            prompts = texts[branch]
            if prompts is None:
                state.conditioning[branch] = self.unprompted(state, parts)
                continue
            unique = list(dict.fromkeys(prompts))
            rows = torch.tensor([unique.index(prompt) for prompt in prompts], device=parts.device)
            with watch_tokenizers(parts.pipeline, unique, state.max_sequence_length, state.readings):
                encoded = self.encode(unique, state, parts)
            state.conditioning[branch] = {
                name: None if value is None else value.index_select(0, rows) for name, value in encoded.items()
            }
        self.report_cuts(state, parts)

    def report_cuts(self, state: State, parts: Components) -> None:
        """Tell the user what the text encoders do not read. Raises `UsageError` with `strict_prompt`."""
        if state.strict_prompt:
            refuse_lost_words(state.readings)
        for prompt, readings in state.readings.items() if parts.warmup is None else ():
            if find_cuts(readings):
                parts.progress.warn(describe_cut(prompt, readings))

    def unprompted(self, state: State, parts: Components) -> dict[str, Any]:
        """Return the conditioning for a missing negative prompt. Raises `UsageError` if guidance requires one."""
        guidance = parts.guidance
        if guidance.unprompted is None:
            raise UsageError(
                f"sampling.{guidance.scale}={getattr(state, guidance.scale)} guides away from a"
                ' negative prompt and there is none: set sampling.negative_prompt=" ", or'
                f" sampling.{guidance.scale}={guidance.unguided:g}"
            )
        positive = state.conditioning[POSITIVE]
        return {**positive, guidance.unprompted: torch.zeros_like(positive[guidance.unprompted])}

    def texts(self, state: State, parts: Components) -> dict[str, list[str] | None]:
        """Return `{branch: N texts}`; None: the branch has no texts."""
        return {POSITIVE: state.prompts, NEGATIVE: state.negative_prompts}

    def encode(self, prompts: list[str], state: State, parts: Components) -> dict[str, Any]:
        """Return the transformer's conditioning, one row per prompt."""
        limit = {} if state.max_sequence_length is None else {"max_sequence_length": state.max_sequence_length}
        return self.run(parts, prompt=prompts, **limit)

    def run(self, parts: Components, **arguments: Any) -> dict[str, Any]:
        """Return the results of `encode_prompt` under the transformer's argument names."""
        encoded = parts.pipeline.encode_prompt(device=parts.device, **self.arguments, **arguments)
        return {name: value for name, value in zip(self.returns, encoded, strict=True) if name is not None}


class EncodeRaggedPrompt(EncodePrompt):
    """For pipelines that return a list of embeddings, each as long as its prompt.

    Pads to the longest: `encoder_hidden_states` with zeros and the mask `encoder_hidden_states_mask` with False.
    """

    def __init__(self, arguments: Mapping[str, Any] | None = None) -> None:
        super().__init__(("encoder_hidden_states", None), arguments)

    def encode(self, prompts: list[str], state: State, parts: Components) -> dict[str, Any]:
        return pad_to_longest(super().encode(prompts, state, parts)["encoder_hidden_states"])


class EncodePromptWithImages(EncodePrompt):
    """Encodes prompts together with the input images, each resized to `image_area` pixels.

    One prompt at a time: the reference pipelines take no batch of prompts with the same images. Pads to the longest:
    `encoder_hidden_states` with zeros and the mask `encoder_hidden_states_mask` with False.
    """

    needs = (*EncodePrompt.needs, "input_images")

    def __init__(self, image_area: int) -> None:
        super().__init__(returns=("encoder_hidden_states", "encoder_hidden_states_mask"))
        self.image_area = image_area

    def encode(self, prompts: list[str], state: State, parts: Components) -> dict[str, Any]:
        refuse_placeholder(prompts, parts.pipeline.processor.image_token)
        resize = parts.pipeline.image_processor.resize
        images = [resize(image, *fit_area(image, self.image_area, 32)) for image in state.input_images]
        return pad_to_longest([self.run(parts, prompt=[p], image=images)["encoder_hidden_states"][0] for p in prompts])


def pad_to_longest(embeds: Sequence[Tensor]) -> dict[str, Any]:
    """Pad each prompt's embeddings `[T, E]` to `[B, T, E]`, with the mask `[B, T]` of real tokens; None: all are."""
    lengths = [len(one) for one in embeds]
    longest = max(lengths)
    padded = torch.stack([F.pad(one, (0, 0, 0, longest - len(one))) for one in embeds])
    places = torch.arange(longest, device=padded.device)
    mask = places < torch.tensor(lengths, device=padded.device)[:, None]
    equal = min(lengths) == longest
    return {"encoder_hidden_states": padded, "encoder_hidden_states_mask": None if equal else mask}


def refuse_placeholder(prompts: list[str], token: str) -> None:
    """Raise `UsageError` for a prompt with the image placeholder: the processor inserts an image at each."""
    for prompt in prompts:
        if token in prompt:
            raise UsageError(
                f"the prompt {prompt[:60]!r} holds {token}, which stands for an input image; leave it out:"
                " the images are put before the prompt"
            )


class EmbedGuidance(Stage):
    """Sets the scale that a guidance-distilled transformer takes as an input; other transformers get none."""

    needs = ("prompts", "guidance_scale")
    gives = ("guidance",)
    phase = "encode"

    def __call__(self, state: State, parts: Components, timings: Timings) -> None:
        if state.guidance_scale is not None:
            state.guidance = torch.full([len(state.prompts)], state.guidance_scale, device=parts.device)
