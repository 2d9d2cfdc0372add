"""Pre-encoded training data: normalized, packed latents of captioned scenes, and the tokens of the captions."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
from transformers import Qwen2Tokenizer

from demo import vae as auto_encoder
from demo.common import default_device, log
from demo.text import tokenize
from hydrarun.outputs.quality.scenes import caption_scene, render_scene, sample_scene


def pack(latents: torch.Tensor) -> torch.Tensor:
    """Join 2x2 cells into tokens like the pipeline: [n, z, h, w] -> [n, h / 2 * w / 2, 4 * z]."""
    n, z, height, width = latents.shape
    cells = latents.view(n, z, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return cells.reshape(n, height // 2 * (width // 2), z * 4)


def _spoken(text: str, rng: random.Random) -> str:
    """Vary a caption: sometimes begin it with a capital letter or end it with a full stop."""
    if rng.random() < 0.1:
        text = text[0].upper() + text[1:]
    return text + "." if rng.random() < 0.05 else text


def part_file(work: Path, rank: int) -> Path:
    return work / f"pool_{rank}.pt"


@torch.no_grad()
def encode_part(rank: int, workers: int, work: Path, size: int) -> None:
    """Write this worker's share of `size` training scenes to its part file: latents (bf16), ids, mask."""
    tokenizer = Qwen2Tokenizer.from_pretrained(work / "tokenizer")
    device = default_device()
    vae = auto_encoder.load(work / "vae.pt").to(device)
    auto_encoder.use_single_frame_convolutions(vae)
    mean, std = (
        torch.tensor(v, device=device).view(1, -1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std)
    )
    rng = random.Random(1000 + rank)
    captions, latents = [], []
    for _ in range(size // workers // 16):
        scenes = [sample_scene(rng) for _ in range(16)]
        pictures = torch.from_numpy(np.stack([render_scene(s) for s in scenes])).permute(0, 3, 1, 2)
        latents.append(pack((auto_encoder.encode(vae, pictures.to(device)) - mean) / std).to("cpu", torch.bfloat16))
        captions += [_spoken(caption_scene(s), rng) for s in scenes]
    ids, mask = tokenize(tokenizer, captions)
    torch.save({"latents": torch.cat(latents), "ids": ids, "mask": mask}, part_file(work, rank))
    log(f"pool part {rank}: {len(captions)} scenes")


def load_pool(work: Path) -> dict[str, torch.Tensor]:
    """Load and join all parts: latents [n, tokens, channels], ids and mask [n, text tokens]."""
    parts = [torch.load(path) for path in sorted(work.glob("pool_*.pt"))]
    return {key: torch.cat([part[key] for part in parts]) for key in ("latents", "ids", "mask")}
