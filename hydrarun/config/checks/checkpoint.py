"""Checks a request against a checkpoint. Reads only JSON, so that errors appear before anything heavy is imported."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydrarun.config.checks import checkpoint_types
from hydrarun.core.errors import UsageError
from hydrarun.core.files import MAX_TEXT_BYTES
from hydrarun.core.strict_json import INFINITE, read_json_object

#: keys of a transformer's config.json for the number of blocks
DEPTHS = ("num_layers", "num_single_layers", "n_layers", "n_refiner_layers")
#: keys for the number of attention heads
HEADS = ("num_attention_heads", "n_heads")
#: key for the number of key/value heads, each shared by a group of heads
SHARED_HEADS = "num_key_value_attention_heads"


def check_folder_fit(config: dict[str, Any], folder: Path) -> None:
    """Raise `UsageError` for settings that the checkpoint in `folder` does not support or would ignore.

    Checks only what the checkpoint's JSON files contain. Raises `RunError` for values of another type than expected.
    """
    files = [folder / "model_index.json", folder / "vae" / "config.json", folder / "transformer" / "config.json"]
    index, vae, transformer = contents = [read_json(file) for file in files]
    sound = checkpoint_types.SOUND if "sampling_rate" in vae else {}
    of_vae = checkpoint_types.VAE | checkpoint_types.LATENTS
    kinds = checkpoint_types.INDEX, of_vae, checkpoint_types.TRANSFORMER | sound
    for file, content, checks in zip(files, contents, kinds, strict=True):
        checkpoint_types.check_types(file, content, checks)
    checkpoint_types.check_rope_axes(files[2], transformer)
    check_checkpoint_configs(config, index, vae, transformer)


def check_checkpoint_configs(
    config: dict[str, Any], index: Mapping[str, Any], vae: Mapping[str, Any], transformer: Mapping[str, Any]
) -> None:
    """Do the same for a checkpoint with this model_index.json and these configs."""
    with name_unusable_values(config["model"]["path"]):
        _check_configs(config, index, vae, transformer)


@contextmanager
def name_unusable_values(path: str) -> Iterator[None]:
    """Turn the error about a value that no check can compute with into a one-line `UsageError`."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UsageError(
            f"model.path={path}: its model_index.json, vae/config.json or transformer/config.json holds a value of the"
            f" wrong kind: {error}"
        ) from error


def _check_configs(
    config: dict[str, Any], index: Mapping[str, Any], vae: Mapping[str, Any], transformer: Mapping[str, Any]
) -> None:
    check_heads(config["parallel"]["tensor_degree"], transformer)
    depth = sum(transformer.get(key) or 0 for key in DEPTHS)
    check_offloaded_blocks(config["offload"], depth, config["device"])
    check_skipped_layers(config["model"]["guidance"].get("layers"), depth)
    check_experts(config["model"], index)
    check_teacache_scheduler(config, index)
    check_request_fit(config["sampling"], vae, transformer, config["model"]["patch_size"])


def check_request_fit(
    sampling: Mapping[str, Any], vae: Mapping[str, Any], transformer: Mapping[str, Any], patch: int
) -> None:
    """Check sizes, frames, seconds and guidance; `patch` is the number of latent pixels per token side.

    Raises `UsageError`, which suggests valid values.
    """
    frames, side = read_vae_factors(vae)
    multiple = find_size_multiple(side or 0, transformer, patch)
    for key in ("height", "width"):
        value = sampling[key]
        if multiple and value is not None and value % multiple:
            raise UsageError(
                f"sampling.{key}={value}: this checkpoint needs a {suggest_multiples(key, value, multiple)}"
            )
        places = transformer.get("pos_embed_max_size")
        if side and value is not None and places and value > side * patch * places:
            raise UsageError(
                f"sampling.{key}={value}: this checkpoint has positions for {places} tokens per side;"
                f" sampling.{key}={side * patch * places} at most"
            )
    count = sampling["num_frames"]
    if frames and count is not None and (count - 1) % frames:
        below = (count - 1) // frames * frames + 1
        raise UsageError(
            f"sampling.num_frames={count}: this checkpoint needs a multiple of {frames} plus 1:"
            f" sampling.num_frames={below} or sampling.num_frames={below + frames}"
        )
    if "guidance_embeds" in transformer:
        check_guidance_scale(sampling["guidance_scale"], transformer["guidance_embeds"])
    if "sampling_rate" in vae and "sample_size" in transformer:
        check_sound_seconds(sampling, vae, transformer)


def check_sound_seconds(sampling: Mapping[str, Any], vae: Mapping[str, Any], transformer: Mapping[str, Any]) -> None:
    """Raise `UsageError` for an end beyond the checkpoint's longest sound, or an empty range of seconds."""
    most = max_sound_seconds(vae, transformer)
    start, end = sampling["audio_start_in_s"] or 0.0, sampling["audio_end_in_s"]
    if end is not None and end > most:
        raise UsageError(
            f"sampling.audio_end_in_s={end:g}: this checkpoint's sounds are {most:.2f} s long;"
            " sampling.audio_end_in_s=null for all of it"
        )
    first, stop = (int(second * vae["sampling_rate"]) for second in (start, most if end is None else end))
    if first >= stop:
        fix = "sampling.audio_start_in_s=0" if stop else "sampling.audio_end_in_s=null"
        raise UsageError(
            f"sampling.audio_start_in_s={start:g}: leaves nothing of a sound that ends at"
            f" {most if end is None else end:g} s; {fix}"
        )


def max_sound_seconds(vae: Mapping[str, Any], transformer: Mapping[str, Any]) -> float:
    """Return the length of the checkpoint's longest sound in seconds."""
    return transformer["sample_size"] * math.prod(vae["downsampling_ratios"]) / vae["sampling_rate"]


def check_experts(model: Mapping[str, Any], index: Mapping[str, Any]) -> None:
    """Raise `UsageError` if the checkpoint has more or fewer transformers than the model option runs."""
    second = (index.get("transformer_2") or [None])[0] is not None
    if index and (second != (model["experts"] > 1) or second != (index.get("boundary_ratio") is not None)):
        raise UsageError(
            f"model.path={model['path']}: model {model['name']} runs {model['experts']} transformer(s), and this"
            f" checkpoint's model_index.json has transformer_2={index.get('transformer_2')} and"
            f" boundary_ratio={index.get('boundary_ratio')}: it belongs to another model"
        )


def check_teacache_scheduler(config: Mapping[str, Any], index: Mapping[str, Any]) -> None:
    """Raise `UsageError` if TeaCache's coefficients were fitted with another scheduler than the run's."""
    fit = (config["cache"].get("gate") or {}).get("fit")
    chosen = config["scheduler"].get("_target_") or (config["model"]["scheduler"] or {}).get("_target_")
    name = chosen.rpartition(".")[2] if chosen else (index.get("scheduler") or [None, None])[1]
    if fit and fit["scheduler"] and name and name != fit["scheduler"]:
        raise UsageError(
            f"cache.gate.fit: the coefficients were fitted with {fit['scheduler']}, not {name}; make them for it:"
            f" hydrarun calibrate model={config['model']['name']} cache=teacache input.prompts=prompts.txt"
        )


def check_heads(ranks: int, transformer: Mapping[str, Any]) -> None:
    """Raise `UsageError` for more tensor-parallel ranks than heads: a head is not split."""
    heads = next((transformer[key] for key in (SHARED_HEADS, *HEADS) if key in transformer), None)
    if heads is not None and heads < 1:
        raise ValueError(f"{heads} attention heads")
    if heads is not None and ranks > heads:
        kind = "groups of heads" if SHARED_HEADS in transformer else "heads"
        raise UsageError(
            f"parallel.tensor_degree={ranks}: this checkpoint has {heads} {kind}, and none is split;"
            f" parallel.tensor_degree={heads} at most"
        )


def check_offloaded_blocks(offload: Mapping[str, Any], depth: int, device: str) -> None:
    """Raise `UsageError` if no block is offloaded: the resident and the buffered blocks cover all `depth` blocks.

    A depth of 0 means unknown.
    """
    resident, ahead = offload.get("resident_blocks"), offload.get("prefetch_blocks")
    if depth and isinstance(resident, int) and isinstance(ahead, int) and resident + ahead + 1 >= depth:
        fixes = ["offload=none" if device == "cpu" else "offload=model"]
        if depth > 2:
            fixes.append("offload.resident_blocks=0 offload.prefetch_blocks=1")
        raise UsageError(
            f"offload.resident_blocks={resident} offload.prefetch_blocks={ahead}: {resident} resident and"
            f" {ahead + 1} buffered blocks cover all {depth} blocks of this checkpoint: use {', or '.join(fixes)}"
        )


def check_skipped_layers(layers: Any, depth: int) -> None:
    """Raise `UsageError` if guidance skips blocks that do not exist. A depth of 0 means unknown."""
    wrong = [layer for layer in layers if layer not in range(depth)] if isinstance(layers, list) else []
    if depth and wrong:
        raise UsageError(
            f"model.guidance.layers={layers}: this checkpoint has no block {wrong[0]};"
            f" its {depth} blocks are 0 to {depth - 1}"
        )


def read_vae_factors(config: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Return frames per latent frame and pixels per latent pixel side; None if the VAE's config lacks it."""
    halvings = config.get("temperal_downsample")  # sic; one entry per halving of the sides; true: also the frames
    if halvings is not None:
        frames, side = 2 ** sum(map(bool, halvings)), 2 ** len(halvings)
        return config.get("scale_factor_temporal") or frames, config.get("scale_factor_spatial") or side
    blocks = config.get("block_out_channels")
    return None, None if blocks is None else 2 ** (len(blocks) - 1)


def find_size_multiple(side: int, transformer: Mapping[str, Any], patch: int) -> int:
    """Return the number that height and width must be a multiple of: the pixels per token side.

    Twice as many with a prior model, whose tokens each cover 2 x 2 tokens. `side`: pixels per latent pixel side.
    """
    return side * patch * (2 if "prior_vq_quantizer_codebook_size" in transformer else 1)


def suggest_multiples(key: str, value: int, multiple: int) -> str:
    """Name the nearest valid values below and above `value`."""
    below, above = value // multiple * multiple, (value // multiple + 1) * multiple
    choice = f"sampling.{key}={below} or sampling.{key}={above}" if below else f"sampling.{key}={above}"
    return f"multiple of {multiple}: {choice}"


def check_guidance_scale(scale: float | None, distilled: bool) -> None:
    """Raise `UsageError` for a scale that the checkpoint ignores, or for null if a guidance-distilled one needs it."""
    if scale is not None and not distilled:
        raise UsageError(
            f"sampling.guidance_scale={scale}: this checkpoint is not guidance-distilled and would ignore it;"
            " sampling.guidance_scale=null, and sampling.true_cfg_scale to guide"
        )
    if scale is None and distilled:
        raise UsageError(
            "sampling.guidance_scale=null: this checkpoint is guidance-distilled and takes it as an input;"
            " sampling.guidance_scale=3.5"
        )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; return an empty one if the file cannot be read. Loading the checkpoint reports that error."""
    try:
        return read_json_object(path, MAX_TEXT_BYTES, INFINITE)
    except (OSError, ValueError):
        return {}
