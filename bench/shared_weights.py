"""Transformers that share one set of random weights, ours and diffusers': so that many rows fit a device together.

Fused weights are kept as ours need them; diffusers' are views of them.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hydrarun.acceleration.offload.modulation_tables import ModulationTables, TableSlot, insert_tables
from hydrarun.acceleration.quantization import TorchAO, count_stored_bytes
from hydrarun.config.checks.checkpoint import DEPTHS
from hydrarun.core.progress import Progress
from hydrarun.engine.plan.configs import ComponentConfigs
from hydrarun.engine.plan.estimate import build_meta_transformer
from hydrarun.models.transformer import Transformer
from hydrarun.models.weights.loader import find_placement, set_parameter
from hydrarun.pipeline.components import quiet_libraries


def smaller(configs: ComponentConfigs, blocks: int | None, heads: int | None) -> ComponentConfigs:
    """The same with a transformer of so many blocks in each list, and heads; None: as published."""
    config = configs.components["transformer"]
    depths = {key: blocks for key in DEPTHS if blocks and key in config}
    widths = {"num_attention_heads": heads} if heads else {}
    return replace(configs, components=configs.components | {"transformer": config | depths | widths})


def random_transformer(
    cls: type[Transformer], configs: ComponentConfigs, device: torch.device, dtype: torch.dtype
) -> Any:
    """Ours, with weights drawn on the device so that values neither grow nor vanish: the variance of a layer's input
    is that of its output, norms and tables are near one and zero."""
    transformer = build_meta_transformer(cls, configs, "transformer", dtype, None)
    torch.manual_seed(0)
    for name, parameter in list(transformer.named_parameters()):
        weight = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        if parameter.ndim > 1:
            weight.normal_(std=1 / math.sqrt(math.prod(parameter.shape[1:])))
        else:
            weight.normal_(mean=float(name.endswith("weight")), std=0.02)
        set_parameter(transformer, name, weight)
    return transformer


def diffusers_transformer(transformer: Transformer, configs: ComponentConfigs, device: torch.device) -> Any:
    """diffusers' transformer on the weights of ours, by the map that loads its checkpoints."""
    cls, config = configs.cls("transformer"), configs.components["transformer"]
    with quiet_libraries():
        with torch.device("meta"):
            theirs = cls.from_config(config)
        small = cls.from_config(config | {key: 0 for key in DEPTHS if key in config})
    for name, module in small.named_children():
        if not isinstance(module, nn.ModuleList) and not any(True for _ in module.parameters()):
            setattr(theirs, name, module.to(device))  # positions: numbers that are no weights
    for name, parameter in transformer.named_parameters():
        for piece in find_placement(transformer, name, tuple(parameter.shape)).pieces:
            set_parameter(theirs, piece.source, parameter.data[piece.put])
    return theirs.eval()


def twin(module: Any) -> Any:
    """A copy that shares all weights, to be compiled, or have tables put in, by itself."""
    tensors = (*module.parameters(), *module.buffers())
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})


def quantized(transformer: Transformer, quantization: TorchAO, device: torch.device) -> Transformer:
    """A twin with weights in 8 bits where they are quantized. Raises `UsageError` where the device cannot."""
    quantization.prepare(device)
    changed = twin(transformer)
    for name, _ in list(changed.named_parameters()):
        quantization.loaded(changed, name)
    return changed


class SharedTables(ModulationTables):
    """Modulation tables from weights that are there for other rows, instead of files."""

    def __init__(self, transformer: Transformer, dtype: torch.dtype) -> None:
        self.transformer = transformer
        self.dtype = dtype
        self.progress = Progress(quiet=True)
        self.places = list(insert_tables(transformer))
        self.made_of: Tensor | None = None

    def compute_table(self, place: TableSlot, temb: Tensor) -> Tensor:
        return place.modulation.values(temb)


def own_bytes(module: nn.Module) -> int:
    """What a model's weights and tables take, shared or not."""
    return sum(count_stored_bytes(tensor) for tensor in (*module.parameters(), *module.buffers()))
