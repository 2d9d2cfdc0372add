"""GLM-Image (https://huggingface.co/zai-org/GLM-Image): an autoregressive model draws a picture of tokens first.

One of its tokens stands for 32 x 32 pixels; the diffusion transformer draws the picture that they lay out. Input images
are a prefix: each passes through the blocks once, by itself and without noise, and the picture attends to the keys and
values that it left there. Reference: diffusers' `GlmImagePipeline` and `GlmImageTransformer2DModel`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers.models.attention import FeedForward as Projector
from diffusers.models.embeddings import PixArtAlphaTextProjection, TimestepEmbedding, Timesteps
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from hydrarun.acceleration.parallel.data import first_ranks
from hydrarun.core.errors import RunError, UsageError
from hydrarun.core.timing import Timings
from hydrarun.models.layers.attention import Attention, Prefix
from hydrarun.models.layers.linear import FeedForward, QKVLinear, RowLinear
from hydrarun.models.layers.norm import AdaLayerNorm, Modulation, modulate
from hydrarun.models.layers.patchify import pack, unpack
from hydrarun.models.layers.rope import frequencies, grid_frequencies, rotate_halves
from hydrarun.models.layers.tensor_parallel import Run
from hydrarun.models.transformer import Arguments, Inputs, Tokens, Transformer
from hydrarun.pipeline.guidance import NEGATIVE
from hydrarun.pipeline.stage import Parts, Stage
from hydrarun.pipeline.stages import images, timesteps
from hydrarun.pipeline.stages.encode import EncodePrompt, pad_to_longest, refuse_placeholder
from hydrarun.pipeline.state import Grid, State

EPS = 1e-5  # of all norms


@dataclass
class GlmImageTokens(Tokens):
    """Tokens, and what stands before them."""

    prefix: Sequence[Prefix] | None = None  # of each block; None: there is none
    kept: list[Prefix] | None = None  # where each block puts what is to be a prefix; None: nothing is


class GlmImageBlock(nn.Module):
    """Text and image tokens through the same weights, but for shifts, scales and gates. `index`: the block's place."""

    def __init__(self, index: int, dim: int, heads: int, head_dim: int, time_embed_dim: int) -> None:
        super().__init__()
        self.index = index
        self.modulation = Modulation(dim, parts=12, width=time_embed_dim)
        self.qkv = QKVLinear(dim, heads, head_dim)
        self.out = RowLinear(dim, Run(heads, head_dim))
        self.feed_forward = FeedForward(dim)
        self.attention = Attention()

    def modulated(self, tokens: Tokens) -> Tensor:
        """The image tokens as the attention's projection sees them, `[B, S, D]`."""
        shift, _, scale, *_ = self.modulation(tokens.temb[:, :1])
        return modulate(tokens.hidden_states, shift, scale, EPS)

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor | None, tokens: GlmImageTokens
    ) -> tuple[Tensor, Tensor | None]:
        """`[B, S, D]` and `[B, T, D]` to the same; without text, None."""
        parts = self.modulation(tokens.temb[:, :1])
        image_parts, text_parts = parts[::2], parts[1::2]
        image = self.project(hidden_states, image_parts, tokens.rope)
        streams, masks = {"hidden_states": image}, {}
        if encoder_hidden_states is not None:
            streams = {"encoder_hidden_states": self.project(encoder_hidden_states, text_parts, None), **streams}
            masks = {"encoder_hidden_states": tokens.encoder_mask}
        if tokens.kept is not None:
            tokens.kept.append(self.attention.keep("hidden_states", *image[1:]))
        prefix = None if tokens.prefix is None else tokens.prefix[self.index]
        *text_attended, image_attended = self.attention(streams, masks, prefix)
        hidden_states = self.finish(hidden_states, image_attended, image_parts)
        if encoder_hidden_states is not None:
            encoder_hidden_states = self.finish(encoder_hidden_states, text_attended[0], text_parts)
        return hidden_states, encoder_hidden_states

    def project(
        self, hidden_states: Tensor, parts: Sequence[Tensor], rope: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`[B, S, D]` to query, key and value `[B, S, H, d]`, normed and, where there is a `rope`, rotated."""
        shift, scale, *_ = parts
        query, key, value = self.qkv(modulate(hidden_states, shift, scale, EPS))
        query, key = (F.layer_norm(x, x.shape[-1:], eps=EPS) for x in (query, key))
        return (query, key, value) if rope is None else (rotate_halves(query, rope), rotate_halves(key, rope), value)

    def finish(self, hidden_states: Tensor, attended: Tensor, parts: Sequence[Tensor]) -> Tensor:
        """Add the attention's and the feed-forward's output to `[B, S, D]`."""
        _, _, gate_attention, shift, scale, gate_feed_forward = parts
        hidden_states = torch.addcmul(hidden_states, gate_attention, self.out(attended))
        update = self.feed_forward(modulate(hidden_states, shift, scale, EPS))
        return torch.addcmul(hidden_states, gate_feed_forward, update)


class TimeAndSizeEmbedding(nn.Module):
    """Timesteps and the picture's height and width, whole and uncropped."""

    def __init__(self, dim: int, condition_dim: int) -> None:
        super().__init__()
        self.time_proj = Timesteps(num_channels=dim, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.condition_proj = Timesteps(num_channels=condition_dim, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.timestep_embedder = TimestepEmbedding(in_channels=dim, time_embed_dim=dim)
        self.condition_embedder = PixArtAlphaTextProjection(4 * condition_dim, dim, act_fn="silu")

    def forward(self, timestep: Tensor, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """`[B]` to `[B, D]`, before the SiLU that a `Modulation` begins with."""
        corner_and_size = torch.tensor([0, 0, *size], device=timestep.device)
        condition = self.condition_embedder(self.condition_proj(corner_and_size).view(1, -1).to(dtype))
        return self.timestep_embedder(self.time_proj(timestep).to(dtype)) + condition


class GlmImageTransformer(Transformer):
    """Arguments are the checkpoint's transformer/config.json."""

    block_lists = ("blocks",)
    weight_map: ClassVar[Mapping[str, str | tuple[str, ...]]] = {
        "image_projector": "image_projector.proj",
        "blocks.*.modulation.linear": "transformer_blocks.*.norm1.linear",
        "blocks.*.qkv": tuple(f"transformer_blocks.*.attn1.{name}" for name in ("to_q", "to_k", "to_v")),
        "blocks.*.out": "transformer_blocks.*.attn1.to_out.0",
        "blocks.*.feed_forward.up": "transformer_blocks.*.ff.net.0.proj",
        "blocks.*.feed_forward.down": "transformer_blocks.*.ff.net.2",
        "norm_out.modulation.linear": "norm_out.linear",
    }

    def __init__(
        self,
        patch_size: int = 2,
        in_channels: int = 16,
        out_channels: int = 16,
        num_layers: int = 30,
        attention_head_dim: int = 40,
        num_attention_heads: int = 64,
        text_embed_dim: int = 1472,
        time_embed_dim: int = 512,
        condition_dim: int = 256,
        prior_vq_quantizer_codebook_size: int = 16384,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.head_dim = attention_head_dim
        dim = num_attention_heads * attention_head_dim
        self.image_projector = nn.Linear(in_channels * patch_size * patch_size, dim)
        self.glyph_projector = Projector(text_embed_dim, dim, inner_dim=dim, activation_fn="gelu")
        self.prior_token_embedding = nn.Embedding(prior_vq_quantizer_codebook_size, dim)
        self.prior_projector = Projector(dim, dim, inner_dim=dim, activation_fn="linear-silu")
        self.time_condition_embed = TimeAndSizeEmbedding(time_embed_dim, condition_dim)
        self.blocks = nn.ModuleList(
            GlmImageBlock(index, dim, num_attention_heads, attention_head_dim, time_embed_dim)
            for index in range(num_layers)
        )
        self.norm_out = AdaLayerNorm(dim, time_embed_dim, EPS)
        self.proj_out = nn.Linear(dim, patch_size * patch_size * out_channels)
        #: what input images left in the blocks, for as long as the latents live that it was made of
        self.prefixes = WeakTensorKeyDictionary()

    def embed(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        *,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor | None,
        told: Tensor,
        grid: Grid,
        prior_tokens: Tensor,
        **sizes: Any,
    ) -> GlmImageTokens:
        """Latents `[B, C, 1, h, w]`, timesteps `[B]` in 1-1000, quoted text `[B, T, E]` and its mask `[B, T]`.

        `told` `[B]` is 1 where the branch is told of the `prior_tokens` `[B, S]`, and 0 where it is not. `sizes`: as in
        `make_temb`.
        """
        image = self.project(pack(hidden_states, self.patch_size), prior_tokens, told)
        text = self.glyph_projector(encoder_hidden_states)
        temb = self.make_temb(timestep, image.dtype, grid=grid, **sizes)
        return GlmImageTokens(image, text, encoder_hidden_states_mask, temb=temb, grid=grid)

    def project(self, packed: Tensor, prior_tokens: Tensor, told: Tensor | None = None) -> Tensor:
        """Packed latents `[B, S, C]` and the ids of their prior tokens `[B, S]` to `[B, S, D]`. `told`: None is 1."""
        prior = self.prior_token_embedding(prior_tokens)
        if told is not None:
            prior = prior * told[:, None, None].to(prior.dtype)
        return self.image_projector(packed) + self.prior_projector(prior)

    def positions(self, hidden_states: Tensor, *, grid: Grid, **_: Any) -> dict[str, Any]:
        return {"rope": rope_table(grid, self.head_dim, hidden_states.device)}

    def make_temb(
        self,
        timestep: Tensor,
        dtype: torch.dtype,
        *,
        grid: Grid,
        height: int,
        width: int,
        image_grids: tuple[Grid, ...] = (),
        **_: Any,
    ) -> Tensor:
        """Timesteps `[B]` to `[B, K, D]`: the picture's, then that of each input image, which has no noise."""
        pixels = height // grid[1]  # of a token's side
        at_rest = torch.zeros_like(timestep)
        each = [(timestep - 1, (height, width))]
        each += [(at_rest, (rows * pixels, columns * pixels)) for _, rows, columns in image_grids]
        return torch.stack([self.time_condition_embed(*one, dtype) for one in each], dim=1)

    def arguments(self, inputs: Inputs, branch: str) -> Arguments:
        """With the prefix, where there are input images; the negative branch is not told of them.

        It makes the prefix too, if it comes first: where weights are shared, ranks run blocks equally often.
        """
        latents, timestep, given, positions, rows = super().arguments(inputs, branch)
        if given["image_latents"] is not None:
            if given["image_latents"] not in self.prefixes:
                self.prefixes[given["image_latents"]] = self.make_prefix(timestep, given, rows)
            if branch != NEGATIVE:
                positions = {**positions, "prefix": self.prefixes[given["image_latents"]]}
        return latents, timestep, given, positions, rows

    def make_prefix(self, timestep: Tensor, given: Mapping[str, Any], rows: Tensor | None) -> list[Prefix]:
        """What the input images leave in each block, one behind the other."""
        latents, prior = given["image_latents"][:1], given["image_prior_tokens"][:1]
        temb = self.make_temb(timestep, latents.dtype, **given) if rows is None else rows
        lengths = [rows * columns for _, rows, columns in given["image_grids"]]
        each = zip(given["image_grids"], latents.split(lengths, 1), prior.split(lengths, 1), strict=True)
        kept = []
        for place, (grid, packed, ids) in enumerate(each, start=1):
            tokens = GlmImageTokens(self.project(packed, ids), temb=temb[:1, place : place + 1], grid=grid, kept=[])
            call = self.spread(replace(tokens, **self.positions(packed, grid=grid)))
            self.run(call)
            kept.append(call.tokens.kept)
        blocks = zip(*kept, strict=True)  # of each, what every image left
        return [(torch.cat([key for key, _ in one], 1), torch.cat([value for _, value in one], 1)) for one in blocks]

    def kept_bytes(self) -> int:
        return sum(kept.nbytes for prefix in self.prefixes.values() for block in prefix for kept in block)

    def head(self, tokens: Tokens) -> Tensor:
        """`[B, S, D]` to the velocity `[B, C, 1, h, w]`, in float32 as the reference goes on with it."""
        predicted = self.proj_out(self.norm_out(tokens.hidden_states, tokens.temb[:, :1]))
        return unpack(predicted, tokens.grid, self.patch_size).float()


@lru_cache(maxsize=16)
def rope_table(grid: Grid, head_dim: int, device: torch.device) -> Tensor:
    """Rotations `[S, d / 2, 2]` of a picture's tokens: half of the pairs by row, half by column."""
    _, rows, columns = grid
    axes = [torch.zeros(1, 0, 2), *(frequencies(torch.arange(side), head_dim // 2) for side in (rows, columns))]
    return grid_frequencies(axes).to(device)


class FitImages(Stage):
    """Input images at the nearest size that both the prior model and the VAE see as the same tokens.

    Where height or width is not set, it is the first one's; without any, `height` and `width`.
    """

    needs = ("input_images", "height", "width")
    gives = ("input_images", "height", "width")
    phase = "encode"

    def __init__(self, height: int, width: int) -> None:
        self.default = height, width

    def __call__(self, state: State, parts: Parts, timings: Timings) -> None:
        state.input_images = [fitted(image, parts) for image in state.input_images]
        sizes = [(image.height, image.width) for image in state.input_images]
        height, width = (*sizes, self.default)[0]
        state.height, state.width = state.height or height, state.width or width


def fitted(image: Image.Image, parts: Parts) -> Image.Image:
    """The image at a size that stays. Raises `UsageError` for one that the prior model does not take."""
    side = 2 * parts.patch_size * parts.pipeline.vae_scale_factor  # pixels of a prior token
    try:
        _, rows, columns = parts.pipeline.processor.image_processor(image)["image_grid_thw"][0]
    except ValueError as error:
        size = f"{image.width} x {image.height}"
        raise UsageError(f"input.images: the prior model does not take a picture of {size} pixels: {error}") from None
    resized = parts.pipeline.image_processor.resize(image, int(rows) * side, int(columns) * side)
    return resized if resized.size == image.size else fitted(resized, parts)


class EncodePromptAndDrawPrior(EncodePrompt):
    """Quoted text to embeddings, and prior tokens drawn from the whole prompt and the input images.

    Each item's are drawn alone, by its own seed. The reference seeds the process' generators of random numbers, which
    are left as they were here. Its negative branch has no text, no prior tokens and no input images.
    """

    needs = (*EncodePrompt.needs, "seeds", "input_images", "height", "width")
    gives = (*EncodePrompt.gives, "prior_tokens", "image_prior_tokens")

    def __init__(self) -> None:
        super().__init__(["encoder_hidden_states", None], {"do_classifier_free_guidance": False})

    def __call__(self, state: State, parts: Parts, timings: Timings) -> None:
        refuse_placeholder(state.prompts, parts.pipeline.processor.image_token)
        encoded = replace(state, negative_prompts=[""] * len(state.prompts))
        super().__call__(encoded, parts, timings)
        for branch, given in encoded.conditioning.items():
            given["told"] = torch.full([len(state.prompts)], float(branch != NEGATIVE), device=parts.device)
        state.conditioning = encoded.conditioning
        with parts.progress.phase("drawing prior tokens", total=len(state.prompts)) as advance:
            drawn = []
            for prompt, seed in zip(state.prompts, state.seeds, strict=True):
                drawn.append(draw_prior(prompt, seed, state, parts))
                advance()
        state.prior_tokens = first_ranks(torch.cat([tokens for tokens, _ in drawn]), parts.mesh)
        state.image_prior_tokens = drawn[0][1]  # the same for all

    def encode(self, prompts: list[str], state: State, parts: Parts) -> dict[str, Any]:
        alone = [super(EncodePromptAndDrawPrior, self).encode([prompt], state, parts) for prompt in prompts]
        return pad_to_longest([one["encoder_hidden_states"][0] for one in alone])


def draw_prior(prompt: str, seed: int, state: State, parts: Parts) -> tuple[Tensor, Tensor | None]:
    """Ids of the picture's tokens `[1, S]`, and of those of all input images `[1, I]`; None: there are none.

    As the reference's `generate_prior_tokens`, whose way with images is not that of today's transformers. Raises
    `RunError` for a prior model that ends before the picture is whole.
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
        torch.manual_seed(seed)  # of all devices
        output = prior.generate(**inputs, max_new_tokens=count, do_sample=True)
    tokens = pipeline._extract_large_image_tokens(output, inputs["input_ids"].shape[1], start, rows * columns)
    if tokens.numel() < rows * columns:
        raise RunError(
            f"the prior model drew {tokens.numel()} of the picture's {rows * columns} tokens and ended there, with seed"
            f" {seed} for the prompt {prompt[:60]!r}: another sampling.seed"
        )
    return pipeline._upsample_token_ids(tokens, rows, columns), torch.cat(of_images, dim=1) if shown else None


class EncodeFittedImages(images.EncodeImages):
    """Each input image as packed latents, at its own size; none is none."""

    def __call__(self, state: State, parts: Parts, timings: Timings) -> None:
        state.image_grids = ()
        if state.input_images:
            super().__call__(state, parts, timings)

    def size(self, image: Image.Image, state: State) -> tuple[int, int]:
        return image.height, image.width


class PrepareTimesteps(timesteps.PrepareTimesteps):
    """Whole numbers evenly from 1000 down are the timesteps; the noise levels that go with them are shifted by size.

    A scheduler that does not take both makes its own.
    """

    def __call__(self, state: State, parts: Parts, timings: Timings) -> None:
        scheduler = parts.pipeline.scheduler
        if not {"timesteps", "sigmas", "mu"} <= inspect.signature(scheduler.set_timesteps).parameters.keys():
            super().__call__(state, parts, timings)
            return
        count = scheduler.config.num_train_timesteps
        steps = np.linspace(count, 1.0, state.num_inference_steps + 1)[:-1].astype(np.int64).astype(np.float32)
        scheduler.set_timesteps(
            timesteps=steps, sigmas=steps / count, mu=self.mu(scheduler.config, state.grid), device=parts.device
        )
        scheduler.set_begin_index(0)
        state.timesteps = scheduler.timesteps

    def mu(self, config: Any, grid: Sequence[int]) -> float:
        tokens = grid[1] * grid[2]
        base = config.get("base_image_seq_len", 256)
        return (tokens / base) ** 0.5 * config.get("max_shift", 0.75) + config.get("base_shift", 0.25)
