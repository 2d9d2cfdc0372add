"""Trains transformer and text encoder together by flow matching on the pre-encoded pool, for a given time."""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers import QwenImageTransformer2DModel
from torch import nn
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from demo.common import MUON_MOMENTUM, agree, average_gradients, default_device, log, orthogonalize
from demo.pool import load_pool
from demo.text import PREFIX_TOKENS, make_text_encoder, tokenize
from demo.transformer import check_against_diffusers, joint_block, make_transformer, predict, rotation_tables

TEXT_DIM = 64
BATCH = 64  # over all workers
CAPTION_DROP = 0.1
SHORT_CAPTION = 19  # tokens; three in four captions are at most this long, and are not padded to the longest
WARM_UP_STEPS = 100
DECAY_PART = 0.5  # final part of the time, in which the learning rate falls to zero
MUON_RATE, ADAM_RATE = 0.015, 0.0015
EMA_DECAY = 0.9985
SAVE_SECONDS = 180
COMPILE_STEPS = 12  # steps at the start without an update: enough for both lengths to occur


class Models(nn.Module):
    """Transformer and text encoder in one module, so that parameter names and averages cover both."""

    def __init__(self, z_dim: int, tokenizer: Qwen2Tokenizer) -> None:
        super().__init__()
        self.transformer: QwenImageTransformer2DModel = make_transformer(z_dim, TEXT_DIM)
        self.text_encoder: Qwen2_5_VLForConditionalGeneration = make_text_encoder(tokenizer, TEXT_DIM)

    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def encode_text(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Encode ids and bool mask [n, 34 + t] to the pipeline's prompt embeddings, [n, t, TEXT_DIM]."""
        model = self.text_encoder.model.language_model
        hidden = model(input_ids=ids, attention_mask=mask.long(), use_cache=False).last_hidden_state
        return hidden[:, PREFIX_TOKENS:] * mask[:, PREFIX_TOKENS:].unsqueeze(-1)


class Optimizer:
    """Muon for the matrices of attention and MLPs, AdamW for everything else.

    The workers split the matrices to orthogonalize, which would otherwise take a fifth of a step.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], rank: int = 0, workers: int = 1) -> None:
        self.rank, self.workers = rank, workers
        self.groups: dict[tuple[int, ...], list[nn.Parameter]] = {}
        rest = []
        for name, p in parameters.items():
            if name.startswith("transformer.transformer_blocks") and p.ndim == 2 and "_mod." not in name:
                self.groups.setdefault(tuple(p.shape), []).append(p)
            else:
                rest.append(p)
        device = rest[0].device
        self.momenta = {shape: torch.zeros(len(ps), *shape, device=device) for shape, ps in self.groups.items()}
        self.adam = torch.optim.AdamW(rest, lr=ADAM_RATE, betas=(0.9, 0.98), weight_decay=0.0, foreach=True)

    @torch.no_grad()
    def step(self, scale: float) -> None:
        for group in self.adam.param_groups:
            group["lr"] = ADAM_RATE * scale
        self.adam.step()
        for shape, parameters in self.groups.items():
            gradient = torch.stack([p.grad for p in parameters if p.grad is not None])
            momentum = self.momenta[shape].mul_(MUON_MOMENTUM).add_(gradient)
            update = self._shared_update(gradient + MUON_MOMENTUM * momentum)
            torch._foreach_mul_(parameters, 1 - 0.02 * MUON_RATE * scale)
            torch._foreach_add_(parameters, list(update.unbind(0)), alpha=-MUON_RATE * scale)

    def _shared_update(self, direction: torch.Tensor) -> torch.Tensor:
        """Orthogonalize [n, rows, columns], in bf16 as usual for Muon: an approximation is enough."""
        update = torch.empty_like(direction)
        bounds = [len(direction) * rank // self.workers for rank in range(self.workers + 1)]
        own = slice(bounds[self.rank], bounds[self.rank + 1])
        update[own] = orthogonalize(direction[own].bfloat16()).float()
        if self.workers > 1:
            for rank, (first, last) in enumerate(itertools.pairwise(bounds)):
                dist.broadcast(update[first:last], rank)
        return update

    def state(self) -> dict[str, Any]:
        return {"adam": self.adam.state_dict(), "momenta": self.momenta}

    def load(self, state: dict[str, Any]) -> None:
        self.adam.load_state_dict(state["adam"])
        for shape, momentum in state["momenta"].items():
            self.momenta[shape].copy_(momentum)


class Batches:
    """Endless shuffled batches with noise. A batch has captions of similar length, to avoid padding.

    Workers with the same `seed` get batches of the same length at each step, so they wait less for each other.
    """

    def __init__(
        self, pool: dict[str, torch.Tensor], empty: tuple[torch.Tensor, torch.Tensor], size: int, seed: int, rank: int
    ) -> None:
        self.pool, self.empty, self.size = pool, empty, size
        self.generator = torch.Generator().manual_seed(1000 * seed + rank)
        self.schedule = torch.Generator().manual_seed(seed)
        lengths = pool["mask"].sum(1)
        edges = [0, PREFIX_TOKENS + SHORT_CAPTION, pool["mask"].shape[1]]
        self.buckets = [
            (high, torch.nonzero((lengths > low) & (lengths <= high)).flatten())
            for low, high in itertools.pairwise(edges)
        ]
        self.orders = [torch.empty(0, dtype=torch.long) for _ in self.buckets]

    def __next__(self) -> dict[str, torch.Tensor]:
        """Draw latents and noise [n, 64, c], sigma [n], ids and mask [n, 34 + t]; a tenth of the captions is empty."""
        length, chosen = self._choose()
        latents = self.pool["latents"][chosen].float()
        ids, mask = self.pool["ids"][chosen, :length], self.pool["mask"][chosen, :length]
        drop = torch.rand(self.size, generator=self.generator) < CAPTION_DROP
        which = torch.randint(len(self.empty[0]), (int(drop.sum()),), generator=self.generator)
        ids[drop], mask[drop] = self.empty[0][which, :length], self.empty[1][which, :length]
        # More weight on medium noise, where the layout is decided; a fifth is uniform, to cover both ends.
        sigma = torch.sigmoid(torch.randn(self.size, generator=self.generator) + 0.4)
        uniform = torch.rand(self.size, generator=self.generator)
        sigma = torch.where(torch.rand(self.size, generator=self.generator) < 0.2, uniform, sigma)
        noise = torch.randn(latents.shape, generator=self.generator)
        return {"latents": latents, "noise": noise, "sigma": sigma, "ids": ids.long(), "mask": mask}

    def _choose(self) -> tuple[int, torch.Tensor]:
        """Choose a batch: its token length and its members. Buckets are sampled by size, members in random order."""
        shares = torch.tensor([float(len(members)) for _, members in self.buckets])
        index = int(torch.multinomial(shares, 1, generator=self.schedule))
        length, members = self.buckets[index]
        if len(self.orders[index]) < self.size:
            self.orders[index] = members[torch.randperm(len(members), generator=self.generator)]
        chosen, self.orders[index] = self.orders[index][: self.size], self.orders[index][self.size :]
        return length, chosen


def _learning_rate(step: int, done: float) -> float:
    return min(1.0, (step + 1) / WARM_UP_STEPS) * max(0.0, min(1.0, (1 - done) / DECAY_PART))


def checkpoint_file(work: Path) -> Path:
    return work / "transformer.pt"


def _save(path: Path, content: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    torch.save(content, partial)
    os.replace(partial, path)


def train(rank: int, workers: int, work: Path, minutes: float) -> None:
    """Train until `minutes` have passed in total, continuing from the checkpoint in `work` if there is one.

    The learning rate follows the clock, so it reaches zero when the time is up on any machine.
    """
    torch.manual_seed(0)
    device = default_device()
    pool = load_pool(work)
    z_dim = pool["latents"].shape[-1] // 4
    tokenizer = Qwen2Tokenizer.from_pretrained(work / "tokenizer")
    models = Models(z_dim, tokenizer).to(device)
    live = models.trainable()
    parameters = list(live.values())
    optimizer = Optimizer(live, rank, workers)
    average = {name: p.detach().clone() for name, p in live.items()}
    step, before = 0, 0.0
    if checkpoint_file(work).exists():
        saved = torch.load(checkpoint_file(work), map_location=device)
        step, before = saved["step"], saved["seconds"]
        for name, p in live.items():
            p.data.copy_(saved["live"][name])
            average[name].copy_(saved["average"][name])
        optimizer.load(saved["optimizer"])
    text_tokens = pool["ids"].shape[1] - PREFIX_TOKENS
    if rank == 0:
        difference = check_against_diffusers(z_dim, TEXT_DIM, text_tokens)
        log(f"quick forward against diffusers: relative difference {difference:.1e}; {len(pool['ids'])} scenes")
        if difference > 1e-5:
            raise RuntimeError("the training forward does not equal the one of diffusers")
    # The pipeline's negative prompt for guidance is " "; the empty prompt is trained too.
    batches = Batches(pool, tokenize(tokenizer, [" ", ""]), BATCH // workers, seed=step, rank=rank)
    tables = {t: rotation_tables(models.transformer, t) for t in (SHORT_CAPTION, text_tokens)}
    block = torch.compile(joint_block, dynamic=False)

    def loss_of(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        batch = {key: value.to(device) for key, value in batch.items()}
        sigma = batch["sigma"].view(-1, 1, 1)
        noisy = (1 - sigma) * batch["latents"] + sigma * batch["noise"]
        with torch.autocast(device.type, dtype=torch.bfloat16):
            text = models.encode_text(batch["ids"], batch["mask"])
            text_mask = batch["mask"][:, PREFIX_TOKENS:]
            velocity = predict(models.transformer, noisy, text, text_mask, batch["sigma"], tables[text.shape[1]], block)
        return (velocity.float() - (batch["noise"] - batch["latents"])).pow(2).mean()

    _compile_in_turn(rank, workers, lambda: [loss_of(next(batches)).backward() for _ in range(COMPILE_STEPS)])
    start, first_step = time.time(), step
    last_saved, smooth, done = before, 0.0, 0.0
    while True:
        seconds = agree(before + time.time() - start, workers)
        done = seconds / (60 * minutes)
        if rank == 0 and (done >= 1 or seconds - last_saved > SAVE_SECONDS):
            state = {name: p.detach() for name, p in live.items()}
            content = {"live": state, "average": average, "optimizer": optimizer.state()}
            _save(checkpoint_file(work), content | {"step": step, "seconds": seconds, "done": done})
            last_saved = seconds
        if done >= 1:
            break
        models.zero_grad()
        loss = loss_of(next(batches))
        loss.backward()
        average_gradients(parameters, workers)
        optimizer.step(_learning_rate(step, done))
        keep = min(EMA_DECAY, (step + 1) / (step + 20))
        torch._foreach_lerp_(list(average.values()), [p.data for p in parameters], 1 - keep)
        step += 1
        smooth += (loss.item() - smooth) * max(0.01, 1 / (step - first_step))
        if rank == 0 and step % 100 == 0:
            log(f"step {step} {seconds:.0f} s, {100 * done:.1f} %, loss {smooth:.4f}")
    if rank == 0:
        log(f"transformer: {step} steps, {step * BATCH} samples, {seconds / 60:.1f} minutes")


def _compile_in_turn(rank: int, workers: int, run: Any) -> None:
    """Compile on the first worker alone; the others then use its cache."""
    if workers > 1 and rank > 0:
        dist.barrier()
    run()
    if workers > 1 and rank == 0:
        dist.barrier()


def load_average(work: Path) -> Models:
    """Load the averaged weights of the checkpoint, fp32 on the CPU."""
    saved = torch.load(checkpoint_file(work), map_location="cpu")
    tokenizer = Qwen2Tokenizer.from_pretrained(work / "tokenizer")
    z_dim = saved["average"]["transformer.proj_out.weight"].shape[0] // 4
    models = Models(z_dim, tokenizer)
    for name, p in models.trainable().items():
        p.data.copy_(saved["average"][name])
    return models.eval()
