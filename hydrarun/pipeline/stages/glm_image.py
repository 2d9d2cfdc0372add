"""GLM-Image's own stages: input images at sizes that its prior model accepts, prior tokens, its schedule."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hydrarun.acceleration.parallel.data import broadcast_ids
from hydrarun.core.errors import RunError, UsageError
from hydrarun.core.timing import Timings
from hydrarun.models.transformer import NEGATIVE
from hydrarun.pipeline.stage import Components, Stage
from hydrarun.pipeline.stages import images, timesteps
from hydrarun.pipeline.stages.encode import EncodePrompt, pad_to_longest, refuse_placeholder
from hydrarun.pipeline.state import State


class FitImages(Stage):
    """Resizes input images to the nearest size that gives the prior model and the VAE the same tokens.

    An unset height or width becomes the first image's; without images, the arguments `height` and `width`.
    """

    needs = ("input_images", "height", "width")
    gives = ("input_images", "height", "width")
    phase = "encode"

    def __init__(self, height: int, width: int) -> None:
        self.default = height, width

    def __call__(self, state: State, parts: Components, timings: Timings) -> None:
        state.input_images = [fit_image(image, parts) for image in state.input_images]
        sizes = [(image.height, image.width) for image in state.input_images]
        height, width = (*sizes, self.default)[0]
        state.height, state.width = state.height or height, state.width or width


def fit_image(image: Image.Image, parts: Components) -> Image.Image:
    """Resize until the size no longer changes. Raises `UsageError` for a size that the prior model rejects."""
    side = 2 * parts.patch_size * parts.pipeline.vae_scale_factor  # pixels of a prior token's side
    try:
        _, rows, columns = parts.pipeline.processor.image_processor(image)["image_grid_thw"][0]
    except ValueError as error:
        size = f"{image.width} x {image.height}"
        raise UsageError(f"input.images: the prior model does not take a picture of {size} pixels: {error}") from None
    resized = parts.pipeline.image_processor.resize(image, int(rows) * side, int(columns) * side)
    return resized if resized.size == image.size else fit_image(resized, parts)


class EncodePromptAndDrawPrior(EncodePrompt):
    """Encodes the prompt's quoted text, and samples prior tokens from the whole prompt and the input images.

    Each item is sampled alone, with its own seed. The reference seeds the process's random generators; here they are
    restored. As in the reference, the negative branch has no text, no prior tokens and no input images.
    """

    needs = (*EncodePrompt.needs, "seeds", "input_images", "height", "width")
    gives = (*EncodePrompt.gives, "prior_tokens", "image_prior_tokens")

    def __init__(self) -> None:
        super().__init__(["encoder_hidden_states", None], {"do_classifier_free_guidance": False})

    def __call__(self, state: State, parts: Components, timings: Timings) -> None:
        refuse_placeholder(state.prompts, parts.pipeline.processor.image_token)
        encoded = replace(state, negative_prompts=[""] * len(state.prompts))
        super().__call__(encoded, parts, timings)
        for branch, given in encoded.conditioning.items():
            given["told"] = torch.full([len(state.prompts)], float(branch != NEGATIVE), device=parts.device)
        state.conditioning = encoded.conditioning
        with parts.progress.phase("drawing prior tokens", total=len(state.prompts)) as advance:
            drawn = []
            for prompt, seed in zip(state.prompts, state.seeds, strict=True):
                drawn.append(draw_prior_tokens(prompt, seed, state, parts))
                advance()
        state.prior_tokens = broadcast_ids(torch.cat([tokens for tokens, _ in drawn]), parts.mesh)
        state.image_prior_tokens = drawn[0][1]  # the same for all items

    def encode(self, prompts: list[str], state: State, parts: Components) -> dict[str, Any]:
        alone = [super(EncodePromptAndDrawPrior, self).encode([prompt], state, parts) for prompt in prompts]
        return pad_to_longest([one["encoder_hidden_states"][0] for one in alone])


def draw_prior_tokens(prompt: str, seed: int, state: State, parts: Components) -> tuple[Tensor, Tensor | None]:
    """Sample the ids of the picture's tokens `[1, S]`; return them and those of all input images `[1, I]` or None.

    Follows the reference's `generate_prior_tokens`, whose image handling does not fit current transformers. Raises
    `RunError` if the prior model stops before the picture is complete.
    """
    pipeline, prior = parts.pipeline, parts.pipeline.vision_language_encoder
    shown = [{"type": "image", "image": image} for image in state.input_images]
    inputs = pipeline.processor.apply_chat_template(
        [[{"role": "user", "content": [*shown, {"type": "text", "text": prompt}]}]],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"target_h": state.height, "target_w": state.width},
    ).to(parts.device)
    grids = inputs["image_grid_thw"]
    count, start, rows, columns = pipeline._compute_generation_params(grids, is_text_to_image=not shown)
    of_images = []
    if shown:
        sources = grids[: len(shown)]
        ids = prior.get_image_tokens(prior.get_image_features(inputs["pixel_values"], sources).pooler_output)
        each = zip(sources.tolist(), ids.split(sources.prod(-1).tolist()), strict=True)
        of_images = [pipeline._upsample_token_ids(own, *sides) for (_, *sides), own in each]
    devices = [parts.device] if parts.device.type == "cuda" else []
    with torch.random.fork_rng(devices, device_type="cuda"):
        torch.manual_seed(seed)  # seeds all devices
        output = prior.generate(**inputs, max_new_tokens=count, do_sample=True)
    tokens = pipeline._extract_large_image_tokens(output, inputs["input_ids"].shape[1], start, rows * columns)
    if tokens.numel() < rows * columns:
        raise RunError(
            f"the prior model drew {tokens.numel()} of the picture's {rows * columns} tokens and ended there, with seed"
            f" {seed} for the prompt {prompt[:60]!r}: try another sampling.seed"
        )
    return pipeline._upsample_token_ids(tokens, rows, columns), torch.cat(of_images, dim=1) if shown else None


class EncodeFittedImages(images.EncodeImages):
    """Encodes each input image to packed latents at its own size; without images there are no latents."""

    def __call__(self, state: State, parts: Components, timings: Timings) -> None:
        state.image_grids = ()
        if state.input_images:
            super().__call__(state, parts, timings)

    def size(self, image: Image.Image, state: State) -> tuple[int, int]:
        return image.height, image.width


class PrepareTimesteps(timesteps.PrepareTimesteps):
    """Sets evenly spaced whole timesteps from 1000 down, with noise levels that are shifted by size.

    If the scheduler does not take both, it spaces its own.
    """

    def set_timesteps(self, scheduler: Any, state: State, device: torch.device) -> None:
        if not {"timesteps", "sigmas", "mu"} <= inspect.signature(scheduler.set_timesteps).parameters.keys():
            super().set_timesteps(scheduler, state, device)
            return
        count = scheduler.config.num_train_timesteps
        steps = np.linspace(count, 1.0, state.num_inference_steps + 1)[:-1].astype(np.int64).astype(np.float32)
        scheduler.set_timesteps(
            timesteps=steps, sigmas=steps / count, mu=self.mu(scheduler.config, state.grid), device=device
        )

    def mu(self, config: Any, grid: Sequence[int]) -> float:
        tokens = grid[1] * grid[2]
        base = config.get("base_image_seq_len", 256)
        return (tokens / base) ** 0.5 * config.get("max_shift", 0.75) + config.get("base_shift", 0.25)
