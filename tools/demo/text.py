"""The demo's tokenizer and text encoder: byte-level BPE on captions, and a two-layer Qwen2.5-VL language model."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from hydrarun.outputs.quality.scenes import caption_scene, sample_scene

# The prompt template of QwenImagePipeline. The pipeline drops the first 34 hidden states, the tokens of the template
# before the prompt in Qwen's vocabulary. The vocabulary trained here must give the same number of tokens.
TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
    "<|im_start|>assistant\n"
)
PREFIX_TOKENS = 34
CAPTION_TOKENS = 28  # enough for the longest caption and the end of the template
SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
# fmt: off
_MORE_WORDS = [  # other words that users try; one token each instead of single letters
    "ring", "cross", "striped", "tiny", "big", "huge", "next", "to", "with", "between", "behind", "picture", "image",
    "drawing", "shapes", "three", "two",
]
# fmt: on


def train_tokenizer(folder: Path) -> Qwen2Tokenizer:
    """Train the vocabulary on the template and on captions, save it, and check the length of the prefix."""
    rng = random.Random(0)
    template_parts = [part for part in TEMPLATE.replace("<|im_start|>", "<|im_end|>").split("<|im_end|>") if part]
    captions = [caption_scene(sample_scene(rng)) for _ in range(4000)]
    words = sorted({word.strip(",") for text in captions for word in text.split()}) + _MORE_WORDS
    spaced = [f" {word}" for word in words] * 20 + words * 20 + [word.capitalize() for word in words] * 3
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=2000, min_frequency=2, initial_alphabet=alphabet, special_tokens=[], show_progress=False
    )
    bpe.train_from_iterator([part.replace("{}", "") for part in template_parts] * 50 + captions + spaced, trainer)
    learned = json.loads(bpe.to_str())["model"]
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in learned["merges"]]
    tokenizer = Qwen2Tokenizer(
        vocab=learned["vocab"],
        merges=merges,
        padding_side="right",
        model_max_length=2048,
        additional_special_tokens=SPECIAL_TOKENS[1:],
    )
    tokenizer.save_pretrained(folder)
    tokenizer = Qwen2Tokenizer.from_pretrained(folder)
    prefix = len(tokenizer(TEMPLATE.split("{}")[0]).input_ids)
    if prefix != PREFIX_TOKENS:
        raise RuntimeError(f"the template's prefix takes {prefix} tokens, the pipeline drops {PREFIX_TOKENS}")
    return tokenizer


def tokenize(tokenizer: Qwen2Tokenizer, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokenize captions in the template, padded right: int16 ids and bool mask, both [n, 34 + CAPTION_TOKENS]."""
    length = PREFIX_TOKENS + CAPTION_TOKENS
    batch = tokenizer([TEMPLATE.format(c) for c in captions], padding="max_length", max_length=length)
    if max(map(len, batch["input_ids"])) > length:
        raise RuntimeError(f"a caption takes more than the {CAPTION_TOKENS} tokens there is room for")
    return torch.tensor(batch["input_ids"], dtype=torch.int16), torch.tensor(batch["attention_mask"], dtype=torch.bool)


def make_text_encoder(tokenizer: Qwen2Tokenizer, hidden: int) -> Qwen2_5_VLForConditionalGeneration:
    """Build an untrained encoder of width `hidden`. Its vision tower is a stub, because the pipeline never uses it."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "rope_theta": 1e6,
            "tie_word_embeddings": True,
            "rope_scaling": {"mrope_section": [2, 3, 3], "rope_type": "default", "type": "default"},
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|endoftext|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": hidden,
            "fullatt_block_indexes": [0],
        },
        tie_word_embeddings=True,
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        vision_token_id=ids["<|vision_pad|>"],
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
    )
    encoder = Qwen2_5_VLForConditionalGeneration(config)
    encoder.model.visual.requires_grad_(False)
    for name, parameter in encoder.named_parameters():
        if "embed_tokens" in name:
            torch.nn.init.normal_(parameter, std=0.5)
        elif parameter.ndim == 2 and "visual" not in name:
            torch.nn.init.normal_(parameter, std=0.08)
    return encoder
