"""Weights in 8 bits, by torchao (https://github.com/pytorch/ao): the options of the `quantization` group.

A weight is kept as 8-bit numbers with a scale for each row, which is an output. Activations stay as they are, or get 8
bits too, with a scale for each token, found anew in every call. What is quantized: the linear layers in the blocks of
the transformers, but for those that a model keeps (`Transformer.keep_unquantized`), and in the repeated layers of the
text encoders. Embeddings, norms, biases and heads are not.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Collection
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from hydrarun.acceleration.offload.strategies import find_use
from hydrarun.acceleration.parallel.hsdp import find_repeated_layers
from hydrarun.core.errors import UsageError
from hydrarun.models.transformer import Transformer

TRANSFORMER, TEXT_ENCODER = COMPONENTS = ("transformer", "text_encoder")

#: what the options are called, by their weights and activations
NAMES = {
    ("int8", "none"): "int8_weight_only",
    ("float8", "none"): "fp8_weight_only",
    ("int8", "int8"): "int8",
    ("float8", "float8"): "fp8",
}

#: bytes that go with each row: a scale in float32 and, of int8, a zero point
ROW_BYTES = {"int8": 5, "float8": 4}

#: kernels for 8-bit activations need sides of a weight that are multiples of this
MULTIPLE = 16

#: the first NVIDIA GPUs that multiply float8 numbers
FLOAT8_CAPABILITY = (8, 9)


class NoQuantization:
    """Weights as they are loaded."""

    name = "none"
    #: whether `loaded` changes modules, which must not be while other threads build some
    changes = False

    def prepare(self, device: torch.device) -> None:
        """Refuse, before weights are read, what cannot be computed on `device`. Raises `UsageError`."""

    def loaded(self, transformer: Transformer, name: str) -> None:
        """The parameter `name` is in its place; called by any thread."""

    def component(self, name: str, module: Any) -> None:
        """The component `name` of a diffusers pipeline is loaded."""

    def summary(self) -> str | None:
        """What was done, for the user."""
        return None


class TorchAO(NoQuantization):
    """8 bits for `weights`, and for `activations` unless they are `none`; of these `components`.

    Raises `UsageError` for what torchao does not have, or where it is not installed.
    """

    def __init__(
        self,
        weights: Literal["int8", "float8"],
        activations: Literal["none", "int8", "float8"],
        components: list[Literal["transformer", "text_encoder"]],
    ) -> None:
        if (weights, activations) not in NAMES:
            raise UsageError(f"quantization.activations={activations}: with weights={weights}, none or {weights}")
        if not components or len(set(components)) < len(components):
            raise UsageError(f"quantization.components={components}: name {' or '.join(COMPONENTS)}, or both, once")
        self.name = NAMES[weights, activations]
        self.dynamic = activations != "none"
        self.components = components
        self.changes = TRANSFORMER in components
        self.lock = threading.Lock()
        self.config: Any = None
        self.layers = self.odd = self.bytes_before = self.bytes_after = 0

    def prepare(self, device: torch.device) -> None:
        """Raises `UsageError` for a missing torchao, and for float8 activations where no kernel multiplies them."""
        if self.name == "fp8" and not supports_float8(device):
            raise UsageError(
                "quantization=fp8 multiplies float8 numbers, which needs an NVIDIA GPU of compute capability 8.9 or"
                f" more (Ada, Hopper, Blackwell), and device={device} is none. Use quantization=fp8_weight_only"
            )
        self.config = make_torchao_config(self.name, device)
        # torch.compile says so of torchao's tensors; what it would save is compiling once more in the next process
        warnings.filterwarnings("ignore", message=".* does not implement _.*_hash_for_caching")

    def loaded(self, transformer: Transformer, name: str) -> None:
        """Quantize it, if it is such a weight: at no time are more of them there in full than there are threads."""
        layer = transformer.get_submodule(name.rpartition(".")[0])
        inside = name.split(".")[0] in transformer.block_lists
        if TRANSFORMER in self.components and inside and is_quantizable(name, layer, find_unquantized(transformer)):
            with self.lock:
                self.quantize(layer)

    def component(self, name: str, module: Any) -> None:
        """Quantize it, layer by layer, if it is a text encoder."""
        if TEXT_ENCODER in self.components and isinstance(module, nn.Module) and find_use(name) == TEXT_ENCODER:
            for part in find_repeated_layers(module):
                for layer in part.modules():
                    if isinstance(layer, nn.Linear):
                        self.quantize(layer)

    def quantize(self, layer: nn.Linear) -> None:
        """Replace the layer's weight, but for one with sides that 8-bit activations cannot be multiplied with."""
        from torchao.quantization import quantize_

        if self.dynamic and any(side % MULTIPLE for side in layer.weight.shape):
            self.odd += 1
            return
        self.bytes_before += count_stored_bytes(layer.weight)
        quantize_(layer, self.config, filter_fn=lambda *_: True)
        self.bytes_after += count_stored_bytes(layer.weight)
        self.layers += 1

    def summary(self) -> str | None:
        """Layers, bytes before and after, and what stayed as it was."""
        size = f"{self.bytes_before / 2**20:,.1f} MiB of weights are now {self.bytes_after / 2**20:,.1f}"
        odd = f"; {self.odd} layers stay as they are: their sides are no multiples of {MULTIPLE}" if self.odd else ""
        return f"quantization={self.name}: {self.layers} linear layers, {size}{odd}"


def find_unquantized(transformer: Transformer) -> Collection[str]:
    """Names of modules in the blocks that are left alone."""
    return {*transformer.keep_unquantized, *transformer.keep_in_float32}


def is_quantizable(name: str, owner: nn.Module, kept: Collection[str] = ()) -> bool:
    """Whether a parameter of a block or layer, by its name and the module that it is of, gets 8 bits."""
    return isinstance(owner, nn.Linear) and name.endswith(".weight") and not set(kept) & set(name.split("."))


def make_torchao_config(name: str, device: torch.device) -> Any:
    """torchao's configuration for an option. Its settings for torch.compile are for the whole process: left alone."""
    try:
        from torchao import quantization as ao
        from torchao.utils import should_reduce_range
    except ImportError:
        raise UsageError(
            f"quantization={name} needs torchao, which is not installed here: pip install 'torchao>=0.18'"
        ) from None
    if name == "int8_weight_only":
        return ao.Int8WeightOnlyConfig(set_inductor_config=False)
    if name == "fp8_weight_only":
        return ao.Float8WeightOnlyConfig(set_inductor_config=False)
    if name == "int8":  # 7 bits on CPUs whose sums of products would overflow
        return ao.Int8DynamicActivationInt8WeightConfig(
            reduce_range=should_reduce_range(device), set_inductor_config=False
        )
    return ao.Float8DynamicActivationFloat8WeightConfig(granularity=ao.PerRow(), set_inductor_config=False)


def supports_float8(device: torch.device) -> bool:
    """Whether the device has such kernels."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= FLOAT8_CAPABILITY


def count_stored_bytes(tensor: Tensor) -> int:
    """Bytes that a tensor takes; of a quantized one those of its numbers and scales."""
    if not is_traceable_wrapper_subclass(tensor):
        return tensor.nbytes
    names, _ = tensor.__tensor_flatten__()
    return sum(getattr(tensor, name).nbytes for name in names)
