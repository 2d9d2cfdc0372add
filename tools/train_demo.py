"""Train the demo text-to-image model from scratch and write it as a QwenImagePipeline folder.

    python tools/train_demo.py --work DIR --out weights/demo [--minutes 90]

Stages: tokenizer, vae, pool, transformer, refine (the decoder), save, judge. A stage whose result is in the work folder
is skipped, and the transformer continues from its last checkpoint, so a killed run can be resumed. `--stage` runs one
stage.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from demo import common, diffusion, pool, release, text, vae

from hydrarun.outputs.quality.scene_judge import sample_held_out_prompts

STAGES = ("tokenizer", "vae", "pool", "transformer", "refine", "save", "judge")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the pool and the checkpoints")
    parser.add_argument("--out", type=Path, required=True, help="output folder of the finished model")
    parser.add_argument("--stage", choices=STAGES, help="run only this stage, even if its result exists")
    parser.add_argument("--minutes", type=float, default=90.0, help="time for the transformer")
    parser.add_argument("--vae-minutes", type=float, default=8.0)
    parser.add_argument("--refine-minutes", type=float, default=5.0)
    parser.add_argument("--z-dim", type=int, default=4, help="latent channels of the auto-encoder")
    parser.add_argument("--scenes", type=int, default=40_000, help="size of the pool")
    parser.add_argument("--workers", type=int, default=common.default_workers())
    parser.add_argument("--prompts", type=int, default=200, help="number of held-out prompts to judge")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 3.0], help="true_cfg_scale values to judge")
    parser.add_argument("--side", type=int, default=128, help="pixels per side of the judged pictures")
    parser.add_argument("--dtype", default="float32", help="dtype of the judged pictures' computation")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    options.work.mkdir(parents=True, exist_ok=True)
    for stage in [options.stage] if options.stage else STAGES:
        _run_stage(stage, options)


def _run_stage(stage: str, options: argparse.Namespace) -> None:
    work, forced = options.work, options.stage is not None
    if stage == "tokenizer":
        if forced or not (work / "tokenizer").exists():
            text.train_tokenizer(work / "tokenizer")
    elif stage == "vae":
        if forced or not (work / "vae.pt").exists():
            common.launch(vae.train, options.workers, work / "vae.pt", options.z_dim, options.vae_minutes)
        accuracy, mean, least = release.judge_auto_encoder(work / "vae.pt", sheet=work / "vae.png")
        common.log(f"reconstructions: {release.describe(accuracy)}; PSNR {mean:.1f} dB, least {least:.1f}")
    elif stage == "pool":
        if forced or not all(pool.part_file(work, rank).exists() for rank in range(options.workers)):
            common.launch(pool.encode_part, options.workers, work, options.scenes)
    elif stage == "transformer":
        common.launch(diffusion.train, options.workers, work, options.minutes)
    elif stage == "refine":
        refined = release.refined_file(work)
        if forced or not refined.exists():
            common.launch(vae.refine, options.workers, work / "vae.pt", refined, options.refine_minutes)
        accuracy, mean, least = release.judge_auto_encoder(refined, sheet=work / "vae_refined.png")
        common.log(f"refined reconstructions: {release.describe(accuracy)}; PSNR {mean:.1f} dB, least {least:.1f}")
    elif stage == "save":
        release.assemble(work, options.out)
    else:
        _judge(options)


def _judge(options: argparse.Namespace) -> None:
    pipeline = release.load_pipeline(options.out, getattr(torch, options.dtype))
    prompts = sample_held_out_prompts(options.prompts)
    print("guidance | steps | right | with size | background | clean | position | colour | shape | size | s/picture")
    for guidance in options.guidance:
        sheet = options.work / f"sheet_{options.side}_steps{options.steps}_guidance{guidance:g}_{options.dtype}.png"
        accuracy, seconds, verdicts = release.judge_prompts(
            pipeline, prompts, options.steps, guidance, sheet, side=options.side
        )
        print(f"{guidance:g} | {options.steps} | {release.describe(accuracy)} | {seconds:.3f}", flush=True)
        wrong = [prompt for prompt, verdict in zip(prompts, verdicts, strict=True) if not verdict.right]
        print(f"  wrong, first 8: {wrong[:8]}", flush=True)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
