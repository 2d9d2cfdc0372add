"""Our transformers and diffusers' with one shared set of random weights, so that many rows fit on a device.

Weights are stored in our fused layout; diffusers' weights are views of them.
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
    """Return configs whose transformer has `blocks` blocks in each list and `heads` heads; None: as published."""
    config = configs.components["transformer"]
    depths = {key: blocks for key in DEPTHS if blocks and key in config}
    widths = {"num_attention_heads": heads} if heads else {}
    return replace(configs, components=configs.components | {"transformer": config | depths | widths})


def random_transformer(
    cls: type[Transformer], configs: ComponentConfigs, device: torch.device, dtype: torch.dtype
) -> Any:
    """Build our transformer with random weights on the device, scaled so that activations neither grow nor vanish.

    Matrices preserve the variance of their input. Norm weights are near one, biases near zero.
    """
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
    """Build diffusers' transformer on the weights of ours, using the weight map for its checkpoints."""
    cls, config = configs.cls("transformer"), configs.components["transformer"]
    with quiet_libraries():
        with torch.device("meta"):
            theirs = cls.from_config(config)
        small = cls.from_config(config | {key: 0 for key in DEPTHS if key in config})
    for name, module in small.named_children():
        if not isinstance(module, nn.ModuleList) and not any(True for _ in module.parameters()):
            setattr(theirs, name, module.to(device))  # positions: buffers without weights
    for name, parameter in transformer.named_parameters():
        for piece in find_placement(transformer, name, tuple(parameter.shape)).pieces:
            set_parameter(theirs, piece.source, parameter.data[piece.put])
    return theirs.eval()


def twin(module: Any) -> Any:
    """Copy a module without its weights, which are shared. The copy can be compiled or get tables independently."""
    tensors = (*module.parameters(), *module.buffers())
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})


def quantized(transformer: Transformer, quantization: TorchAO, device: torch.device) -> Transformer:
    """Return a copy with quantized weights. Raises `UsageError` if the device does not support them."""
    quantization.prepare(device)
    changed = twin(transformer)
    for name, _ in list(changed.named_parameters()):
        quantization.loaded(changed, name)
    return changed


class SharedTables(ModulationTables):
    """Modulation tables computed from the weights in memory, which other rows use, instead of files."""

    def __init__(self, transformer: Transformer, dtype: torch.dtype) -> None:
        self.transformer = transformer
        self.dtype = dtype
        self.progress = Progress(quiet=True)
        self.places = list(insert_tables(transformer))
        self.made_of: Tensor | None = None

    def compute_table(self, place: TableSlot, temb: Tensor) -> Tensor:
        return place.modulation.values(temb)


def own_bytes(module: nn.Module) -> int:
    """Return the bytes of a model's weights and tables, shared or not."""
    return sum(count_stored_bytes(tensor) for tensor in (*module.parameters(), *module.buffers()))
