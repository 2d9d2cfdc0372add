"""A tiny random checkpoint of a model with an autoregressive prior. Its tokens are sampled once and then cached."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, GlmImagePipeline, GlmImageTransformer2DModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    ByT5Tokenizer,
    GlmImageConfig,
    GlmImageForConditionalGeneration,
    GlmImageProcessor,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)
from transformers.models.glm_image.image_processing_pil_glm_image import GlmImageImageProcessorPil

from tests.helpers import tiny

CODES = 128  # codebook size of the prior; its ids come first
SPECIAL = ["<|endoftext|>", "<|image|>", "<sop>", "<eop>", "<|bos|>", "<|user|>", "<|assistant|>"]
SPECIAL += ["<|begin_of_image|>", "<|end_of_image|>", "<|pad|>"]
SYMBOLS = [*(f"<code{index}>" for index in range(CODES)), *sorted(pre_tokenizers.ByteLevel.alphabet()), *SPECIAL]
IDS = {symbol: index for index, symbol in enumerate(SYMBOLS)}
CHAT = (
    "{% for message in messages %}<|user|>{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<|begin_of_image|><|image|><|end_of_image|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
    "<|assistant|>"
)
#: the scheduler of CogView4, from the same authors
SCHEDULER = {
    "base_shift": 0.25,
    "max_shift": 0.75,
    "time_shift_type": "linear",
    "use_dynamic_shifting": True,
}


def glm_image() -> GlmImagePipeline:
    torch.manual_seed(0)
    transformer = GlmImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=3,
        text_embed_dim=16,
        time_embed_dim=24,
        condition_dim=8,
        prior_vq_quantizer_codebook_size=CODES,
    )
    statistics = {"latents_mean": [0.1, -0.2, 0.3, 0.05], "latents_std": [1.5, 0.8, 1.1, 2.0]}
    vae = tiny.kl_vae(4, blocks=(8, 8, 16, 16))  # 8 pixels per latent, 32 per token of the prior
    vae.register_to_config(**statistics)
    pipeline = GlmImagePipeline(
        tokenizer=ByT5Tokenizer(),
        processor=_processor(),
        text_encoder=_byt5(),
        vision_language_encoder=_prior(),
        vae=vae,
        transformer=tiny.randomise(transformer, std=0.12),
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER),
    )
    pipeline.register_to_config(  # as in published model indices
        processor=("transformers", "GlmImageProcessor"),
        vision_language_encoder=("transformers", "GlmImageForConditionalGeneration"),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _byt5() -> T5EncoderModel:
    torch.manual_seed(0)
    return T5EncoderModel(T5Config(vocab_size=384, d_model=16, d_ff=32, d_kv=8, num_layers=2, num_heads=2)).eval()


def _processor() -> GlmImageProcessor:
    bytes_alone = Tokenizer(models.BPE(vocab=IDS, merges=[]))
    bytes_alone.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_alone.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytes_alone,
        bos_token="<|bos|>",
        pad_token="<|pad|>",
        eos_token="<|endoftext|>",
        padding_side="left",
        additional_special_tokens=SPECIAL,
        extra_special_tokens={"image_token": "<|image|>", "grid_bos_token": "<sop>", "grid_eos_token": "<eop>"},
    )
    images = GlmImageImageProcessorPil(
        patch_size=16, merge_size=1, temporal_patch_size=1, min_pixels=64 * 64, max_pixels=128 * 128
    )
    return GlmImageProcessor(image_processor=images, tokenizer=tokenizer, chat_template=CHAT)


def _prior() -> GlmImageForConditionalGeneration:
    """The weights are large enough that prompts and images change the result."""
    config = GlmImageConfig(
        text_config={
            "vocab_size": 512,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 2048,
            "vision_vocab_size": CODES,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
            "pad_token_id": IDS["<|pad|>"],
            "eos_token_id": IDS["<|endoftext|>"],
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "num_heads": 2,
            "image_size": 64,
            "patch_size": 16,
            "intermediate_size": 16,
        },
        vq_config={"embed_dim": 16, "num_embeddings": CODES, "latent_channels": 16},
        image_token_id=IDS["<|image|>"],
        image_start_token_id=IDS["<|begin_of_image|>"],
        image_end_token_id=IDS["<|end_of_image|>"],
    )
    torch.manual_seed(0)
    prior = tiny.randomise(GlmImageForConditionalGeneration(config), std=0.3)
    prior.generation_config.update(do_sample=True, temperature=0.9, top_p=0.8, top_k=0)  # saved as a separate file
    return prior


class ImagesAsExpected:
    """Wraps the prior for diffusers 0.42, which expects image features as rows; transformers 5.23 returns maps."""

    def __init__(self, prior: GlmImageForConditionalGeneration) -> None:
        self.prior = prior

    def __getattr__(self, name: str) -> Any:
        return getattr(self.prior, name)

    def get_image_features(self, pixels: torch.Tensor, grids: torch.Tensor) -> SimpleNamespace:
        maps = self.prior.get_image_features(pixels, grids).pooler_output
        return SimpleNamespace(pooler_output=[one.flatten(1).t() for one in maps])

    def get_image_tokens(self, rows: torch.Tensor, grids: torch.Tensor) -> torch.Tensor:
        each = zip(rows.split(grids.prod(-1).tolist()), grids.tolist(), strict=True)
        return self.prior.get_image_tokens([own.t().unflatten(1, sides) for own, (_, *sides) in each])


def with_images_as_expected(pipeline: GlmImagePipeline) -> GlmImagePipeline:
    """Return a pipeline that accepts images; the given one fails on them with these library versions."""
    whole = GlmImagePipeline(**pipeline.components)
    whole.vision_language_encoder = ImagesAsExpected(pipeline.vision_language_encoder)
    whole.set_progress_bar_config(disable=True)
    return whole


def remembering(generate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Wrap `generate` so that equal inputs are sampled once, since the hundreds of model calls take half a second."""
    seen: dict[bytes, torch.Tensor] = {}

    @functools.wraps(generate)
    def draw(self: Any, **inputs: Any) -> torch.Tensor:
        key = hashlib.sha256(repr((torch.initial_seed(), self.generation_config)).encode())
        for value in (*inputs.values(), *(weight for weight in self.lm_head.parameters())):
            whole = value.detach().cpu().double().numpy().tobytes() if isinstance(value, torch.Tensor) else b""
            key.update(
                whole
                + repr(
                    (value if isinstance(value, int) else type(value)),
                ).encode()
            )
        if key.digest() not in seen:
            seen[key.digest()] = generate(self, **inputs).cpu()
        return seen[key.digest()].to(self.device)

    return draw


GlmImageForConditionalGeneration.generate = remembering(GlmImageForConditionalGeneration.generate)
