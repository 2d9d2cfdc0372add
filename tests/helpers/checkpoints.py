"""Tiny random checkpoints of every model option as diffusers' own pipelines, built without network.

Sizes are small; settings are the published ones wherever the arithmetic depends on them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImageLayeredPipeline,
    QwenImagePipeline,
    SD3Transformer2DModel,
    StableAudioPipeline,
    StableDiffusion3Pipeline,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
)
from tokenizers import pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

from hydrarun.core import resources
from hydrarun.pipeline.processors import drop_video_processor
from tests.helpers import checkpoint_stable_audio, checkpoint_zimage, checkpoints_chat, checkpoints_prior, tiny

TEXT_WIDTH = 16  # of the text embeddings for the transformers
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,'\"!?-"
#: the published scheduler of FLUX.1-dev
FLUX_SCHEDULER = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "shift": 3.0,
    "use_dynamic_shifting": True,
}


def demo() -> QwenImagePipeline:
    """Load the trained checkpoint that is shipped."""
    return _quiet(
        QwenImagePipeline.from_pretrained(resources.find_folder("weights") / "demo", torch_dtype=torch.float32)
    )


def qwen_image_edit() -> QwenImageEditPipeline:
    return _edit(QwenImageEditPipeline)


def qwen_image_edit_plus() -> QwenImageEditPlusPipeline:
    return _edit(QwenImageEditPlusPipeline, zero_cond_t=True)


def qwen_image_layered() -> QwenImageLayeredPipeline:
    """The VAE has 8 channels: diffusers takes a picture with as many channels as latents (4 with alpha) for latents."""
    switches = {"use_additional_t_cond": True, "use_layer3d_rope": True}
    pipeline = _edit(QwenImageLayeredPipeline, vae=_layered_vae(), channels=8, **switches)
    shifting = {"shift_terminal": None, "time_shift_type": "linear"}  # as published
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(**{**tiny.SCHEDULER, **shifting})
    # captions end, and the generation settings affect them
    pipeline.text_encoder.generation_config.update(eos_token_id=[*range(0, 256, 8), 258], repetition_penalty=1.3)
    return pipeline


def _layered_vae() -> AutoencoderKLQwenImage:
    return _lively(
        AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=8,
            dim_mult=[1, 2, 2],
            num_res_blocks=1,
            temperal_downsample=[False, True],
            input_channels=4,
            **latent_statistics(8),
        )
    )


def _edit(cls: type[DiffusionPipeline], vae: AutoencoderKLQwenImage | None = None, **transformer: Any) -> Any:
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<|video_pad|>"], special_tokens=True)  # the processor counts these tokens too
    pipeline = cls(
        scheduler=FlowMatchEulerDiscreteScheduler(**tiny.SCHEDULER),
        vae=vae or _edit_vae(),
        text_encoder=tiny.text_encoder(),
        tokenizer=tokenizer,
        processor=drop_video_processor(Qwen2VLProcessor)(
            Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=56 * 56), tokenizer
        ),
        transformer=tiny.transformer(**transformer),
    )
    pipeline.register_to_config(processor=("transformers", "Qwen2VLProcessor"))  # as in published model indices
    return _quiet(pipeline)


def _edit_vae() -> AutoencoderKLQwenImage:
    """The VAE halves the size five times, because these pipelines always work on a megapixel, here 32x32 latents."""
    return _lively(
        AutoencoderKLQwenImage(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 2, 2, 2, 2, 2],
            num_res_blocks=1,
            temperal_downsample=[False, False, False, True, True],
            **latent_statistics(4),
        )
    )


def _lively(vae: torch.nn.Module) -> Any:
    """Set weights that keep the scale of a signal; with the usual small ones every picture is the same grey."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in vae.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            inputs = parameter[0].numel()
            if parameter.ndim == 1:  # a bias
                parameter.copy_(0.1 * noise)
            elif inputs == 1:  # a norm's scale
                parameter.copy_(1 + 0.1 * noise)
            else:
                parameter.copy_(noise / inputs**0.5)
    return vae.eval()


def latent_statistics(channels: int) -> dict[str, list[float]]:
    """Return the mean and deviation of every latent channel; neighbouring channels differ."""
    return {
        "latents_mean": [0.1 * (channel % 5) - 0.2 for channel in range(channels)],
        "latents_std": [0.8 + 0.3 * (channel % 4) for channel in range(channels)],
    }


def flux_dev() -> FluxPipeline:
    return _flux(FLUX_SCHEDULER, guidance_embeds=True)


def flux_schnell() -> FluxPipeline:
    return _flux({**FLUX_SCHEDULER, "shift": 1.0, "use_dynamic_shifting": False}, guidance_embeds=False)


def _flux(scheduler: dict[str, Any], guidance_embeds: bool) -> FluxPipeline:
    return _quiet(
        FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(**scheduler),
            vae=_flux_vae(),
            text_encoder=_clip(),
            tokenizer=_clip_tokenizer(),
            text_encoder_2=_t5(T5EncoderModel, T5Config),
            tokenizer_2=_t5_tokenizer(),
            transformer=_flux_transformer(guidance_embeds),
        )
    )


def _flux_transformer(guidance_embeds: bool) -> FluxTransformer2DModel:
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 6, 6),
    )
    return tiny.randomise(model, std=0.15)


def _flux_vae(**factors: float) -> AutoencoderKL:
    return tiny.kl_vae(4, **factors)


def _clip(cls: type = CLIPTextModel, width: int = TEXT_WIDTH) -> Any:
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=520,
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=width,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=1,
    )
    return cls(config).eval()


def _clip_tokenizer() -> CLIPTokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<|startoftext|>", "<|endoftext|>", *alphabet, *(symbol + "</w>" for symbol in alphabet)]
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)


def _t5(encoder: type, config: type, width: int = TEXT_WIDTH) -> Any:
    """Build T5 for FLUX.1, or UMT5 (separate position biases in every layer) for Wan."""
    torch.manual_seed(0)
    sizes = {"d_model": width, "d_ff": 32, "d_kv": 8, "num_layers": 2, "num_heads": 2, "vocab_size": 80}
    return encoder(config(**sizes, num_decoder_layers=0)).eval()


def _t5_tokenizer() -> T5Tokenizer:
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in LETTERS)]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=512)


def sd35_medium() -> StableDiffusion3Pipeline:
    return _sd35(dual_attention_layers=(0,))


def sd35_large() -> StableDiffusion3Pipeline:
    return _sd35(dual_attention_layers=())


def _sd35(dual_attention_layers: tuple[int, ...]) -> StableDiffusion3Pipeline:
    """The encoder widths differ, so that they cannot be confused; those of CLIP add up to less than that of T5."""
    one, other, t5 = 16, 24, 48
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3,  # all kinds of blocks if one has dual attention; the last has no text output
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=t5,
        caption_projection_dim=48,
        pooled_projection_dim=one + other,
        sample_size=16,
        pos_embed_max_size=12,
        dual_attention_layers=dual_attention_layers,
        qk_norm="rms_norm",
    )
    return _quiet(
        StableDiffusion3Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=_flux_vae(scaling_factor=1.5305, shift_factor=0.0609),
            text_encoder=_clip(CLIPTextModelWithProjection, one),
            tokenizer=_clip_tokenizer(),
            text_encoder_2=_clip(CLIPTextModelWithProjection, other),
            tokenizer_2=_clip_tokenizer(),
            text_encoder_3=_t5(T5EncoderModel, T5Config, t5),
            tokenizer_3=_t5_tokenizer(),
            transformer=tiny.randomise(transformer, std=0.12),
        )
    )


def zimage() -> ZImagePipeline:
    return checkpoint_zimage.zimage(_flux_vae())


def stable_audio() -> StableAudioPipeline:
    return checkpoint_stable_audio.stable_audio(_t5(T5EncoderModel, T5Config), _t5_tokenizer(), TEXT_WIDTH)


def wan21_t2v() -> WanPipeline:
    return _quiet(WanPipeline(**_wan_parts(), transformer=_wan_transformer(16, 16)))


def wan22_t2v_a14b() -> WanPipeline:
    return _quiet(WanPipeline(**_wan_parts(), **_wan_experts(16, 16), boundary_ratio=0.875))


def wan22_i2v_a14b() -> WanImageToVideoPipeline:
    return _quiet(WanImageToVideoPipeline(**_wan_parts(), **_wan_experts(36, 16), boundary_ratio=0.9))


def wan22_ti2v_5b() -> WanPipeline:
    parts = _wan_parts(vae=_wan22_vae(), flow_shift=5.0)
    return _quiet(WanPipeline(**parts, transformer=_wan_transformer(48, 48), expand_timesteps=True))


def _wan_parts(vae: AutoencoderKLWan | None = None, flow_shift: float = 3.0) -> dict[str, Any]:
    return {
        "tokenizer": _t5_tokenizer(),
        "text_encoder": _t5(UMT5EncoderModel, UMT5Config),
        "vae": vae or _wan_vae(16),
        "scheduler": UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow_shift
        ),
    }


def _wan_experts(in_channels: int, out_channels: int) -> dict[str, WanTransformer3DModel]:
    """Build the experts for high noise and for low noise, with different weights."""
    return {
        "transformer": _wan_transformer(in_channels, out_channels, seed=0),
        "transformer_2": _wan_transformer(in_channels, out_channels, seed=1),
    }


def _wan_transformer(in_channels: int, out_channels: int, seed: int = 0) -> WanTransformer3DModel:
    torch.manual_seed(seed)
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=3,
        attention_head_dim=16,  # rotary parts 8 + 4 + 4, unequal like the published 44 + 42 + 42
        in_channels=in_channels,
        out_channels=out_channels,
        text_dim=TEXT_WIDTH,
        freq_dim=256,
        ffn_dim=64,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=64,
    )
    return tiny.randomise(model, std=0.12, seed=seed)


def _wan_vae(channels: int, **settings: Any) -> AutoencoderKLWan:
    """8 pixels and 4 frames per latent, as published; video sizes are multiples of 16 pixels."""
    statistics = latent_statistics(channels)
    return _lively(AutoencoderKLWan(base_dim=4, z_dim=channels, num_res_blocks=1, **statistics, **settings))


def _wan22_vae() -> AutoencoderKLWan:
    """16 pixels and 4 frames per latent, a factor of 2 of them by patches; sizes are multiples of 32."""
    return _wan_vae(48, is_residual=True, in_channels=12, out_channels=12, patch_size=2, scale_factor_spatial=16)


#: builders by the name of the model option
BUILDERS: dict[str, Callable[[], DiffusionPipeline]] = {
    "demo": demo,
    "qwen_image": tiny.qwen_image,
    "qwen_image_2512": tiny.qwen_image,
    "qwen_image_edit": qwen_image_edit,
    "qwen_image_edit_plus": qwen_image_edit_plus,
    "qwen_image_layered": qwen_image_layered,
    "flux_dev": flux_dev,
    "flux_schnell": flux_schnell,
    "sd35_large": sd35_large,
    "sd35_medium": sd35_medium,
    "longcat_image": checkpoints_chat.longcat_image,
    "longcat_image_edit": checkpoints_chat.longcat_image_edit,
    "ovis_image": checkpoints_chat.ovis_image,
    "zimage": zimage,
    "zimage_turbo": zimage,
    "stable_audio": stable_audio,
    "glm_image": checkpoints_prior.glm_image,
    "wan21_t2v_14b": wan21_t2v,
    "wan21_t2v_1_3b": wan21_t2v,
    "wan22_t2v_a14b": wan22_t2v_a14b,
    "wan22_i2v_a14b": wan22_i2v_a14b,
    "wan22_ti2v_5b": wan22_ti2v_5b,
}


def _quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
