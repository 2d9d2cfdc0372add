"""Tiny checkpoints with random weights in diffusers' layout, built without network."""

from __future__ import annotations

import inspect
from contextlib import contextmanager
from functools import wraps
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImagePipeline
from diffusers import QwenImageTransformer2DModel as ReferenceTransformer
from tokenizers import pre_tokenizers
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
#: the published scheduler settings, so that the shift by size and the terminal stretch are tested too
SCHEDULER = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 8192,
    "max_shift": 0.9,
    "shift_terminal": 0.02,
    "use_dynamic_shifting": True,
}


def randomise(module: torch.nn.Module, std: float, seed: int = 0) -> torch.nn.Module:
    """Fill all parameters with random values, because the zeros and ones of new models hide errors."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * std
            parameter.copy_(noise if parameter.ndim > 1 else parameter + noise)
    return module.eval()


def transformer(layers: int = 3, heads: int = 3, seed: int = 0, channels: int = 4, **kwargs) -> ReferenceTransformer:
    model = ReferenceTransformer(
        patch_size=2,
        in_channels=4 * channels,
        out_channels=channels,
        num_layers=layers,
        attention_head_dim=16,
        num_attention_heads=heads,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
        **kwargs,
    )
    return randomise(model, std=0.15, seed=seed)


def vae() -> AutoencoderKLQwenImage:
    """Build a VAE that halves the size twice: sizes must be multiples of 8."""
    torch.manual_seed(0)
    return AutoencoderKLQwenImage(
        base_dim=16,
        z_dim=4,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.1, -0.2, 0.3, 0.05],
        latents_std=[1.5, 0.8, 1.1, 2.0],
    ).eval()


def kl_vae(
    channels: int,
    blocks: tuple[int, ...] = (8, 16, 16),
    scaling_factor: float = 0.3611,
    shift_factor: float = 0.1159,
) -> AutoencoderKL:
    """Build a VAE that halves the size twice: sizes must be multiples of 8. More `blocks` halve it more often."""
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(blocks),
        up_block_types=("UpDecoderBlock2D",) * len(blocks),
        block_out_channels=blocks,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()


def tokenizer() -> Qwen2Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: index for index, symbol in enumerate(alphabet + SPECIAL)}
    return Qwen2Tokenizer(
        vocab=vocab, merges=[], eos_token="<|im_end|>", pad_token="<|endoftext|>", additional_special_tokens=SPECIAL
    )


def text_encoder() -> Qwen2_5_VLForConditionalGeneration:
    ids = {symbol: 256 + index for index, symbol in enumerate(SPECIAL)}
    ends = {
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
    }
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "vocab_size": 320,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
            **ends,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 16,
            "fullatt_block_indexes": [0],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|image_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        **ends,
    )
    torch.manual_seed(0)
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def qwen_image() -> QwenImagePipeline:
    pipeline = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER),
        vae=vae(),
        text_encoder=text_encoder(),
        tokenizer=tokenizer(),
        transformer=transformer(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def overrides(folder: Path, model: str = "qwen_image") -> list[str]:
    """Return the overrides of a small run on the checkpoint in `folder`."""
    return [
        f"model={model}",
        f"model.path={folder}",
        "device=cpu",
        "dtype=float32",
        "sampling.prompt=a cat",
        "sampling.num_inference_steps=4",
        "sampling.height=64",
        "sampling.width=64",
    ]


def config(folder: Path, *more: str) -> dict:
    """Compose the configuration of this run as the command does."""
    from hydrarun.config.compose import compose_config

    return compose_config([*overrides(folder), *more])


def runner(folder: Path, *more: str):
    from hydrarun.engine.runner import Runner

    return Runner(config(folder, *more))


def load_transformer(cls: type, folder: Path, dtype: torch.dtype = torch.float32, **options):
    """Load our transformer on the CPU; `options` are those of `hydrarun.models.weights.loader.load_transformer`."""
    from hydrarun.core.progress import Progress
    from hydrarun.core.threads import ThreadPool
    from hydrarun.models.weights.loader import load_transformer

    given = {"device": torch.device("cpu"), "dtype": dtype, "note": print, **options}
    with Progress(quiet=True).reading("loading") as tally, ThreadPool() as pool:
        return load_transformer(cls, folder, pool=pool, tally=tally, **given)


def predict(transformer, latents, timestep, conditioning):
    """Return the prediction of one branch."""
    from hydrarun.acceleration.cache.base import NoCache
    from hydrarun.models.transformer import Inputs, Step

    return transformer(Inputs(latents, timestep, {"positive": conditioning}), Step(), NoCache())["positive"]


def draw(runner, images=(), cache=None, **sampling):
    """Draw with these `sampling` fields, input images and cache node; return the finished state."""
    from hydrarun.core.timing import Timings
    from hydrarun.pipeline.request import make_state

    fields = {**runner.config["sampling"], **sampling}
    return runner.draw(make_state(fields, images), Timings(torch.device("cpu")), cache)


def reference(pipeline, state, output_type: str):
    """Run diffusers' pipeline on the items of our request, one by one; return latents, or pixels as an array."""
    if output_type == "latent" and state.layers:  # the pipeline fails with `output_type="latent"`
        return reference_latents_and_pixels(pipeline, state)[0]
    items = [reference_item(pipeline, state, index, output_type) for index in range(len(state.prompts))]
    return with_frames(torch.cat(items)) if output_type == "latent" else np.concatenate(items)


def reference_latents_and_pixels(pipeline, state):
    """Return latents and pixels of the same run. The latents are the last ones that the scheduler returns."""
    latents, items, step = [], [], pipeline.scheduler.step
    steps = []

    @wraps(step)  # pipelines inspect its signature
    def noting(*args, **kwargs):
        steps.append(step(*args, **kwargs))
        return steps[-1]

    pipeline.scheduler.step = noting  # not every pipeline has a callback
    try:
        for index in range(len(state.prompts)):
            items.append(reference_item(pipeline, state, index, "np"))
            latents.append(steps[-1][0])
    finally:
        del pipeline.scheduler.step
    return with_frames(torch.cat(latents)), np.concatenate(items)


def with_frames(latents: torch.Tensor) -> torch.Tensor:
    """Add the axis of frames that our unpacked latents have and some references omit."""
    return latents.unsqueeze(2) if latents.ndim == 4 else latents


def reference_item(pipeline, state, index: int, output_type: str):
    """Run diffusers' pipeline on one item, with those of our fields that it accepts."""
    accepted = inspect.signature(pipeline.__call__).parameters
    guided = max(state.true_cfg_scale or 0, (state.guidance_scale or 0) if "true_cfg_scale" not in accepted else 0) > 1
    fields = ("true_cfg_scale", "guidance_scale", "guidance_scale_2", "height", "width", "num_frames")
    fields += ("audio_start_in_s", "audio_end_in_s", "layers")
    given = {name: getattr(state, name) for name in (*fields, "num_inference_steps", "max_sequence_length")}
    given["prompt"] = [state.prompts[index]]
    given["negative_prompt"] = [state.negative_prompts[index]] if guided and state.negative_prompts else None
    if state.input_images:
        alone = len(state.input_images) == 1 and not hasattr(pipeline, "generate_prior_tokens")
        given["image"] = state.input_images[0] if alone else state.input_images
    known = {name: value for name, value in given.items() if name in accepted and value is not None}
    generator = torch.Generator().manual_seed(state.seeds[index])
    with drawn_at(pipeline, state.height, state.width):
        return pipeline(**known, **as_written(pipeline), generator=[generator], output_type=output_type)[0]


@contextmanager
def drawn_at(pipeline, height: int, width: int):
    """Make a pipeline without size arguments draw at this size, and not at a megapixel."""
    module = inspect.getmodule(type(pipeline))
    sized = "height" in inspect.signature(pipeline.__call__).parameters
    with pytest.MonkeyPatch.context() as patch:
        if not sized and hasattr(module, "calculate_dimensions"):
            patch.setattr(module, "calculate_dimensions", lambda area, ratio: (width, height))
        yield


def as_written(pipeline) -> dict[str, bool]:
    """Return the arguments that keep a pipeline from rewriting prompts."""
    accepted = inspect.signature(pipeline.__call__).parameters
    return {name: False for name in ("enable_prompt_rewrite",) if name in accepted}
