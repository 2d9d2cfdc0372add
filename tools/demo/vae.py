"""The demo auto-encoder: a small AutoencoderKLQwenImage trained on single frames.

For one frame, all temporal taps of a causal 3-D convolution except the last see zeros, so it equals the 2-D convolution
with the last tap. Training uses the 2-D form (several times faster on a CPU) and leaves the other taps at zero.
"""

from __future__ import annotations

import functools
import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage
from diffusers.models.autoencoders import autoencoder_kl_qwenimage as qwen_vae
from torch import nn

from demo.common import MUON_MOMENTUM, agree, average_gradients, default_device, log, orthogonalize
from hydrarun.outputs.quality.scenes import Scene, render_scene, sample_loose_scene, sample_scene

PICTURE = 128  # pixels per side
CROP = 64  # pixels per side in the first part of the training
CELL = 8  # pixels per side of a latent cell
LATENT_NOISE = 0.1  # makes the decoder robust to small errors of the transformer
JOINT_PART, CROP_PART = 0.7, 0.5  # shares of the time in which the encoder is trained, and in which crops are used


def make_vae(z_dim: int, mean: list[float] | None = None, std: list[float] | None = None) -> AutoencoderKLQwenImage:
    """Build an untrained 8x auto-encoder in the Qwen-Image layout; `mean` and `std` are per latent channel."""
    return AutoencoderKLQwenImage(
        base_dim=16,
        dim_mult=[1, 2, 2, 2],
        z_dim=z_dim,
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=mean or [0.0] * z_dim,
        latents_std=std or [1.0] * z_dim,
    )


def use_single_frame_convolutions(vae: AutoencoderKLQwenImage) -> None:
    """Compute one-frame inputs with the equivalent 2-D convolutions. Changes only this instance."""
    for module in vae.modules():
        if isinstance(module, qwen_vae.QwenImageCausalConv3d) and module.stride == (1, 1, 1):
            module.forward = functools.partial(_convolve_frame, module)


def _convolve_frame(conv: nn.Conv3d, x: torch.Tensor, cache_x: torch.Tensor | None = None) -> torch.Tensor:
    """Convolve [batch, channels, 1, height, width] to the same shape with the output channels."""
    if x.shape[2] != 1 or cache_x is not None:
        return type(conv).forward(conv, x, cache_x)
    padding = conv._padding  # left, right, top, bottom, front, back
    return F.conv2d(x[:, :, 0], conv.weight[:, :, -1], conv.bias, padding=(padding[2], padding[0])).unsqueeze(2)


def initialize(vae: AutoencoderKLQwenImage) -> None:
    """Scale the used temporal tap by its own fan-in and start residual branches at zero: a linear auto-encoder.

    The default initialization counts all 27 taps of a 3x3x3 kernel, while a single frame uses 9. Weights would be too
    small, and the first hundred steps wasted.
    """
    for name, module in vae.named_modules():
        if isinstance(module, nn.Conv3d):
            module.weight.data.zero_()
            used = module.weight.data[:, :, -1]
            gain = 2.0 if ".conv1" in name else 1.0
            if ".conv2" not in name:
                used.normal_(0, (gain / used[0].numel()) ** 0.5)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            module.weight.data.normal_(0, module.weight[0].numel() ** -0.5)
            nn.init.zeros_(module.bias)
            if name.endswith("proj"):
                nn.init.zeros_(module.weight)


def encode(vae: AutoencoderKLQwenImage, pictures: torch.Tensor) -> torch.Tensor:
    """Encode uint8 [n, 3, height, width] to the posterior mean, float [n, z, height / 8, width / 8], not normalized."""
    x = (pictures.float() / 127.5 - 1).unsqueeze(2)
    return vae.quant_conv(vae.encoder(x)).chunk(2, dim=1)[0][:, :, 0]


def decode(vae: AutoencoderKLQwenImage, latents: torch.Tensor) -> torch.Tensor:
    """Decode [n, z, height / 8, width / 8] to [n, 3, height, width] in about -1..1."""
    return vae.decoder(vae.post_quant_conv(latents.unsqueeze(2)))[:, :, 0]


def to_pictures(decoded: torch.Tensor) -> np.ndarray:
    """Convert [n, 3, h, w] in -1..1 to uint8 [n, h, w, 3]."""
    return ((decoded.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return L1 (flat areas) + L1 of the gradients (sharp edges) + L2 with a small weight (outliers)."""
    error = output - target
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + 0.3 * edges + 0.5 * error.pow(2).mean()


class KernelMuon:
    """Muon for convolution kernels as matrices [out, in * height * width]. 3-D kernels use only their last tap."""

    def __init__(self, kernels: list[nn.Parameter]) -> None:
        self.kernels = kernels
        self.momenta: dict[int, torch.Tensor] = {}

    def step(self, rate: float) -> None:
        for index, kernel in enumerate(self.kernels):
            if kernel.grad is None:
                continue
            gradient = self._used(kernel.grad).flatten(1)
            momentum = self.momenta.setdefault(index, torch.zeros_like(gradient)).mul_(MUON_MOMENTUM).add_(gradient)
            update = orthogonalize((gradient + MUON_MOMENTUM * momentum)[None])[0]
            used = self._used(kernel.data)
            used.sub_(update.view_as(used), alpha=rate)

    @staticmethod
    def _used(kernel: torch.Tensor) -> torch.Tensor:
        return kernel[:, :, -1] if kernel.ndim == 5 else kernel


def _picture_pool(seed: int, count: int) -> torch.Tensor:
    """Render uint8 [count, 3, 128, 128]: three in four are captioned training scenes, the others random shapes."""
    rng = random.Random(seed)
    scenes = [sample_scene(rng) if k % 4 else sample_loose_scene(rng) for k in range(count)]
    return torch.from_numpy(np.stack([render_scene(s, PICTURE) for s in scenes])).permute(0, 3, 1, 2).contiguous()


def _batch(pool: torch.Tensor, size: int, crop: bool) -> torch.Tensor:
    chosen = pool[torch.randint(len(pool), (size,))]
    if not crop:
        return chosen
    top, left = (CELL * random.randrange((PICTURE - CROP) // CELL + 1) for _ in range(2))
    return chosen[:, :, top : top + CROP, left : left + CROP]


class _Optimizer:
    """Muon for the kernels among `parameters`, AdamW for the rest."""

    def __init__(self, parameters: list[nn.Parameter], workers: int, muon_rate: float, adam_rate: float) -> None:
        self.parameters, self.workers, self.muon_rate, self.adam_rate = parameters, workers, muon_rate, adam_rate
        self.muon = KernelMuon([p for p in parameters if p.ndim >= 4])
        rest = [p for p in parameters if p.ndim < 4]
        self.adam = torch.optim.AdamW(rest, lr=adam_rate, betas=(0.9, 0.99), weight_decay=0.0)

    def step(self, loss: torch.Tensor, scale: float) -> None:
        for p in self.parameters:
            p.grad = None
        loss.backward()
        average_gradients(self.parameters, self.workers)
        for group in self.adam.param_groups:
            group["lr"] = self.adam_rate * scale
        self.adam.step()
        self.muon.step(self.muon_rate * scale)


def train(rank: int, workers: int, out: Path, z_dim: int, minutes: float, pictures: int = 6000) -> None:
    """Train for `minutes` and save state, latent mean and standard deviation to the file `out`.

    Trains everything on crops first, then on whole pictures, and finally the decoder alone with a frozen encoder.
    """
    torch.manual_seed(0)
    device = default_device()
    vae = make_vae(z_dim)
    initialize(vae)
    vae.to(device).train()
    use_single_frame_convolutions(vae)
    torch.manual_seed(10 + rank)
    random.seed(20 + rank)
    pool = _picture_pool(30 + rank, pictures)
    whole_batch, crop_batch = 12 // workers, 32 // workers
    optimizer = _Optimizer(list(vae.parameters()), workers, muon_rate=0.012, adam_rate=2e-3)
    start, step, done = time.time(), 0, 0.0
    while done < 1:
        done = agree((time.time() - start) / (60 * minutes), workers)
        target = _batch(pool, crop_batch if done < CROP_PART else whole_batch, done < CROP_PART).to(device)
        with torch.set_grad_enabled(done < JOINT_PART):
            latents = encode(vae, target)
        output = decode(vae, latents + LATENT_NOISE * torch.randn_like(latents))
        loss = reconstruction_loss(output, target.float() / 127.5 - 1)
        scale = min(1.0, (step + 1) / 20) * max(0.0, min(1.0, (1 - done) / 0.6)) + 1e-3
        optimizer.step(loss + 1e-3 * latents.pow(2).mean(), scale)
        if step % 50 == 0 and rank == 0:
            log(f"vae step {step} done {done:.2f} loss {loss.item():.4f} latent deviation {latents.std().item():.2f}")
        step += 1
    if rank == 0:
        _finish(vae, pool, out)
        log(f"vae: {step} steps of {workers} x {crop_batch} crops or {whole_batch} pictures")


def refine(rank: int, workers: int, source: Path, out: Path, minutes: float, pictures: int = 2400) -> None:
    """Train the decoder further, on captioned scenes with many stars, whose points it rounds off.

    Encoder and latents do not change, so a transformer trained on them remains valid.
    """
    device = default_device()
    vae = load(source).to(device)
    use_single_frame_convolutions(vae)
    torch.manual_seed(40 + rank)
    random.seed(50 + rank)
    pool = _star_pool(60 + rank, pictures)
    with torch.no_grad():
        all_latents = torch.cat([encode(vae, part.to(device)) for part in pool.split(16)])
    decoder = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    vae.encoder.requires_grad_(False)
    optimizer = _Optimizer(decoder, workers, muon_rate=0.006, adam_rate=1e-3)
    cells = CROP // CELL + 1
    start, step, done = time.time(), 0, 0.0
    while done < 1:
        done = agree((time.time() - start) / (60 * minutes), workers)
        chosen = torch.randint(len(pool), (24 // workers if done < 0.7 else 8 // workers,))
        latents, target = all_latents[chosen.to(device)], pool[chosen].to(device)
        if done < 0.7:
            top, left = (random.randrange(PICTURE // CELL - cells + 1) for _ in range(2))
            latents = latents[:, :, top : top + cells, left : left + cells]
            target = target[:, :, top * CELL : (top + cells) * CELL, left * CELL : (left + cells) * CELL]
        noise = LATENT_NOISE * torch.rand(len(latents), 1, 1, 1, device=device) * torch.randn_like(latents)
        loss = reconstruction_loss(decode(vae, latents + noise), target.float() / 127.5 - 1)
        optimizer.step(loss, min(1.0, (step + 1) / 20) * max(0.0, 1 - done) + 1e-3)
        if step % 50 == 0 and rank == 0:
            log(f"refine step {step} done {done:.2f} loss {loss.item():.4f}")
        step += 1
    if rank == 0:
        saved = torch.load(source)
        torch.save(saved | {"state": {name: tensor.cpu() for name, tensor in vae.state_dict().items()}}, out)
        log(f"refine: {step} steps")


def _star_pool(seed: int, count: int) -> torch.Tensor:
    """Render uint8 [count, 3, 128, 128]: training scenes, at least half of them with a star that is not large."""
    rng = random.Random(seed)
    scenes: list[Scene] = []
    while len(scenes) < count:
        scene = sample_scene(rng)
        starry = any(obj.shape == "star" and obj.size != "large" for obj in scene.objects)
        if starry or len(scenes) % 2:
            scenes.append(scene)
    return torch.from_numpy(np.stack([render_scene(s, PICTURE) for s in scenes])).permute(0, 3, 1, 2).contiguous()


@torch.no_grad()
def _finish(vae: AutoencoderKLQwenImage, pool: torch.Tensor, out: Path) -> None:
    device = next(vae.parameters()).device
    latents = torch.cat([encode(vae, part.to(device)) for part in pool[:1024].split(32)])
    vae.quant_conv.weight[vae.config.z_dim :] = 0  # the second half is the log variance: makes sampling return the mean
    vae.quant_conv.bias[vae.config.z_dim :] = -10.0
    for name, parameter in vae.named_parameters():
        if "time_conv" in name:
            parameter.zero_()
        elif parameter.ndim == 5:
            parameter[:, :, :-1] = 0
    state = {name: tensor.cpu() for name, tensor in vae.state_dict().items()}
    mean, std = latents.mean((0, 2, 3)).cpu(), latents.std((0, 2, 3)).cpu()
    torch.save({"state": state, "mean": mean, "std": std}, out)


def load(path: Path) -> AutoencoderKLQwenImage:
    """Load the trained auto-encoder, with its latent statistics in the config, for single frames (fp32, CPU)."""
    saved = torch.load(path)
    mean, std = ([round(float(v), 4) for v in saved[key]] for key in ("mean", "std"))
    vae = make_vae(len(mean), mean, std)
    vae.load_state_dict(saved["state"])
    return vae.eval()
