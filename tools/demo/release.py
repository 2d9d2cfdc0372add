"""Writes the diffusers folder and judges its pictures."""

from __future__ import annotations

import random
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline
from numpy.typing import NDArray
from PIL import Image
from transformers import Qwen2Tokenizer

from demo import vae as auto_encoder
from demo.common import default_device, log
from demo.diffusion import load_average
from hydrarun.models.weights import checksums
from hydrarun.outputs.quality.scene_judge import SceneAccuracy, SceneVerdict, judge_picture, summarize_verdicts
from hydrarun.outputs.quality.scenes import caption_scene, render_scene, sample_scene

# Qwen-Image's own scheduler settings.
SCHEDULER = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 8192,
    "max_shift": 0.9,
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "shift_terminal": 0.02,
    "time_shift_type": "exponential",
    "use_dynamic_shifting": True,
}
SHEET_COLUMNS = 8


def refined_file(work: Path) -> Path:
    return work / "vae_refined.pt"


def assemble(work: Path, out: Path) -> None:
    """Write the averaged weights, with the refined decoder if there is one, as a QwenImagePipeline folder in bf16."""
    auto_encoder_file = refined_file(work) if refined_file(work).exists() else work / "vae.pt"
    models = load_average(work)
    tokenizer = Qwen2Tokenizer.from_pretrained(work / "tokenizer")
    pipeline = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER),
        vae=auto_encoder.load(auto_encoder_file).to(torch.bfloat16),
        text_encoder=models.text_encoder.to(torch.bfloat16),
        tokenizer=tokenizer,
        transformer=models.transformer.to(torch.bfloat16),
    )
    pipeline.save_pretrained(out)
    files = sorted(out.glob("*/*.safetensors"))
    sums = "".join(f"{checksums.compute_sha256(file)}  {file.relative_to(out).as_posix()}\n" for file in files)
    (out / checksums.SUMS).write_text(sums)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    log(f"{out}: {size / 1e6:.2f} MB")


def load_pipeline(folder: Path, dtype: torch.dtype) -> QwenImagePipeline:
    pipeline = QwenImagePipeline.from_pretrained(folder, torch_dtype=dtype).to(default_device())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(
    pipeline: QwenImagePipeline, prompts: list[str], steps: int, guidance: float, seed: int, side: int = 128
) -> NDArray[np.uint8]:
    """Draw one picture per prompt, with consecutive seeds from `seed`: uint8 [n, side, side, 3]."""
    generators = [torch.Generator().manual_seed(seed + k) for k in range(len(prompts))]
    negative = {"negative_prompt": [" "] * len(prompts)} if guidance > 1 else {}
    images = pipeline(
        prompts,
        height=side,
        width=side,
        num_inference_steps=steps,
        true_cfg_scale=guidance,
        generator=generators,
        output_type="np",
        **negative,
    ).images
    return (images * 255).round().astype(np.uint8)


def judge_prompts(
    pipeline: QwenImagePipeline,
    prompts: list[str],
    steps: int,
    guidance: float,
    sheet: Path | None = None,
    batch: int = 20,
    side: int = 128,
) -> tuple[SceneAccuracy, float, list[SceneVerdict]]:
    """Return the accuracy, the seconds per picture and the verdicts. Saves the first 64 pictures to `sheet`."""
    start, pictures = time.time(), []
    for first in range(0, len(prompts), batch):
        pictures += list(draw(pipeline, prompts[first : first + batch], steps, guidance, 1000 + first, side))
    seconds = (time.time() - start) / len(prompts)
    verdicts = [judge_picture(picture, prompt) for picture, prompt in zip(pictures, prompts, strict=True)]
    if sheet:
        save_sheet(sheet, pictures[:64])
    return summarize_verdicts(verdicts), seconds, verdicts


def save_sheet(path: Path, pictures: list[NDArray[np.uint8]]) -> None:
    """Save pictures as a grid with eight per row, without an incomplete last row."""
    rows = [np.concatenate(pictures[k : k + SHEET_COLUMNS], 1) for k in range(0, len(pictures), SHEET_COLUMNS)]
    Image.fromarray(np.concatenate([row for row in rows if row.shape == rows[0].shape], 0)).save(path)


def describe(accuracy: SceneAccuracy) -> str:
    """Format a Markdown table row, in per cent: right, with size, background, clean, place, colour, shape, size."""
    names = ("right", "right_with_size", "background", "clean", "position", "color", "shape", "size")
    return " | ".join(f"{100 * getattr(accuracy, name):.1f}" for name in names)


@torch.no_grad()
def judge_auto_encoder(file: Path, count: int = 200, sheet: Path | None = None) -> tuple[SceneAccuracy, float, float]:
    """Return the accuracy of reconstructed held-out scenes, and their mean and minimum PSNR in dB."""
    vae = auto_encoder.load(file)
    auto_encoder.use_single_frame_convolutions(vae)
    rng = random.Random(77)
    scenes = [sample_scene(rng, held_out=True) for _ in range(count)]
    originals = np.stack([render_scene(scene) for scene in scenes])
    rebuilt = []
    for part in torch.from_numpy(originals).permute(0, 3, 1, 2).split(16):
        rebuilt.append(auto_encoder.to_pictures(auto_encoder.decode(vae, auto_encoder.encode(vae, part))))
    pictures = np.concatenate(rebuilt)
    error = ((pictures.astype(np.float64) - originals) ** 2).mean((1, 2, 3))
    psnr = 10 * np.log10(255**2 / np.maximum(error, 1e-9))
    if sheet:
        save_sheet(sheet, [picture for pair in zip(originals[:16], pictures[:16], strict=True) for picture in pair])
    verdicts = [judge_picture(picture, caption_scene(scene)) for picture, scene in zip(pictures, scenes, strict=True)]
    return summarize_verdicts(verdicts), float(psnr.mean()), float(psnr.min())
