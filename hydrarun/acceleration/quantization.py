"""8-bit weights with torchao (https://github.com/pytorch/ao): the options of the `quantization` group.

A weight is stored as 8-bit numbers with one scale per row (output channel). Activations keep their dtype, or are
quantized to 8 bits too, with one scale per token that every call computes. Quantized are the linear layers in the
transformers' blocks, except those that a model excludes (`Transformer.keep_unquantized` and `keep_in_float32`), and
those in the repeated layers of the text encoders. Embeddings, norms, biases and heads are not quantized.
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

#: option names, by the types of weights and activations
NAMES = {
    ("int8", "none"): "int8_weight_only",
    ("float8", "none"): "fp8_weight_only",
    ("int8", "int8"): "int8",
    ("float8", "float8"): "fp8",
}

#: extra bytes per row: a float32 scale and, for int8, a zero point
ROW_BYTES = {"int8": 5, "float8": 4}

#: kernels for 8-bit activations need weight dimensions that are multiples of this
MULTIPLE = 16

#: compute capability of the first NVIDIA GPUs that multiply float8 numbers
FLOAT8_CAPABILITY = (8, 9)


class NoQuantization:
    """Keeps the weights as they are loaded."""

    name = "none"
    #: whether `loaded` changes modules; then no other thread may build modules at the same time
    changes = False

    def prepare(self, device: torch.device) -> None:
        """Raise `UsageError`, before weights are read, for an option that cannot run on `device`."""

    def loaded(self, transformer: Transformer, name: str) -> None:
        """Handle the loaded parameter `name`. Any thread may call this."""

    def component(self, name: str, module: Any) -> None:
        """Handle the loaded component `name` of a diffusers pipeline."""

    def summary(self) -> str | None:
        """Return a note for the user; None: there is nothing to report."""
        return None


class TorchAO(NoQuantization):
    """Quantizes the `weights` of `components` to 8 bits, and the `activations` unless they are `none`.

    Raises `UsageError` for combinations that torchao does not support.
    """

    def __init__(
        self,
        weights: Literal["int8", "float8"],
        activations: Literal["none", "int8", "float8"],
        components: list[Literal["transformer", "text_encoder"]],
    ) -> None:
        if (weights, activations) not in NAMES:
            raise UsageError(
                f"quantization.activations={activations}: with weights={weights} it must be none or {weights}"
            )
        if not components or len(set(components)) < len(components):
            raise UsageError(
                f"quantization.components={components}: list {' or '.join(COMPONENTS)}, or both, each once"
            )
        self.name = NAMES[weights, activations]
        self.dynamic = activations != "none"
        self.components = components
        self.changes = TRANSFORMER in components
        self.lock = threading.Lock()
        self.config: Any = None
        self.layers = self.odd = self.bytes_before = self.bytes_after = 0

    def prepare(self, device: torch.device) -> None:
        """Raise `UsageError` if torchao is missing, or for float8 activations on a device without float8 kernels."""
        if self.name == "fp8" and not supports_float8(device):
            raise UsageError(
                "quantization=fp8 multiplies float8 numbers, which needs an NVIDIA GPU of compute capability 8.9 or"
                f" more (Ada, Hopper, Blackwell), and device={device} is not one. Use quantization=fp8_weight_only"
            )
        self.config = make_torchao_config(self.name, device)
        # torch.compile warns about torchao's tensors; the only effect is that the next process compiles again
        warnings.filterwarnings("ignore", message=".* does not implement _.*_hash_for_caching")

    def loaded(self, transformer: Transformer, name: str) -> None:
        """Quantize the parameter's layer if it qualifies. Each thread holds at most one such weight unquantized."""
        layer = transformer.get_submodule(name.rpartition(".")[0])
        inside = name.split(".")[0] in transformer.block_lists
        if TRANSFORMER in self.components and inside and is_quantizable(name, layer, find_unquantized(transformer)):
            with self.lock:
                self.quantize(layer)

    def component(self, name: str, module: Any) -> None:
        """Quantize the repeated layers of a text encoder, one linear layer at a time."""
        if TEXT_ENCODER in self.components and isinstance(module, nn.Module) and find_use(name) == TEXT_ENCODER:
            for part in find_repeated_layers(module):
                for layer in part.modules():
                    if isinstance(layer, nn.Linear):
                        self.quantize(layer)

    def quantize(self, layer: nn.Linear) -> None:
        """Replace the layer's weight, unless the kernels for 8-bit activations do not support its dimensions."""
        from torchao.quantization import quantize_

        if self.dynamic and any(side % MULTIPLE for side in layer.weight.shape):
            self.odd += 1
            return
        self.bytes_before += count_stored_bytes(layer.weight)
        quantize_(layer, self.config, filter_fn=lambda *_: True)
        self.bytes_after += count_stored_bytes(layer.weight)
        self.layers += 1

    def summary(self) -> str | None:
        """Return the numbers of layers and bytes before and after, and of layers that were left unquantized."""
        size = f"{self.bytes_before / 2**20:,.1f} MiB of weights are now {self.bytes_after / 2**20:,.1f}"
        odd = f"; {self.odd} layers stay as they are: their sides are no multiples of {MULTIPLE}" if self.odd else ""
        return f"quantization={self.name}: {self.layers} linear layers, {size}{odd}"


def find_unquantized(transformer: Transformer) -> Collection[str]:
    """Return names of modules in the blocks that are not quantized."""
    return {*transformer.keep_unquantized, *transformer.keep_in_float32}


def is_quantizable(name: str, owner: nn.Module, kept: Collection[str] = ()) -> bool:
    """Return whether the parameter `name` of the module `owner` is quantized. `kept`: names of excluded modules."""
    return isinstance(owner, nn.Linear) and name.endswith(".weight") and not set(kept) & set(name.split("."))


def make_torchao_config(name: str, device: torch.device) -> Any:
    """Return torchao's config for an option.

    It leaves torch.compile's settings alone, because those hold for the whole process.
    """
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
    if name == "int8":  # 7 bits on CPUs where the sums of products would overflow
        return ao.Int8DynamicActivationInt8WeightConfig(
            reduce_range=should_reduce_range(device), set_inductor_config=False
        )
    return ao.Float8DynamicActivationFloat8WeightConfig(granularity=ao.PerRow(), set_inductor_config=False)


def supports_float8(device: torch.device) -> bool:
    """Return whether the device has float8 kernels."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= FLOAT8_CAPABILITY


def count_stored_bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor; for a quantized tensor, those of its numbers and scales."""
    if not is_traceable_wrapper_subclass(tensor):
        return tensor.nbytes
    names, _ = tensor.__tensor_flatten__()
    return sum(getattr(tensor, name).nbytes for name in names)
