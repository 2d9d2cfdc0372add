"""Attention backends, the options of the `attention` group.

Backends are created before weights are loaded. The constructor raises `UsageError` if this machine cannot run the
backend; the message includes the command that installs it. Tensors are `[B, S, H, D]`; `mask` `[B, K]` bool is True for
real keys.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hydrarun.core.errors import UsageError


class SDPA:
    """torch's `scaled_dot_product_attention`, which selects its own kernel."""

    name = "sdpa"

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        wide = None if mask is None else mask[:, None, None, :]
        return F.scaled_dot_product_attention(query, key, value, attn_mask=wide).transpose(1, 2)

    def with_log_sum(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Compute attention without a mask; also return the log-sum-exp of each query's scores, `[B, S, H]`."""
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        kernels = torch.ops.aten
        if query.device.type == "cpu":
            output, log = kernels._scaled_dot_product_flash_attention_for_cpu(query, key, value)[:2]
        elif query.dtype == torch.float32:
            output, log = kernels._scaled_dot_product_efficient_attention(query, key, value, None, True)[:2]
        else:
            output, log = kernels._scaled_dot_product_flash_attention(query, key, value)[:2]
        return output.transpose(1, 2), log[..., : query.shape[2]].transpose(1, 2)


class CuDNNAttention(SDPA):
    """cuDNN's kernel through torch."""

    name = "cudnn"

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise UsageError("attention=cudnn needs an NVIDIA GPU, and torch sees none here. Use attention=sdpa")
        if not torch.backends.cuda.cudnn_sdp_enabled():
            raise UsageError("attention=cudnn: this torch has it switched off. Use attention=sdpa")

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return super().__call__(query, key, value, mask)


class FlexAttention:
    """torch's `flex_attention`, compiled on first use."""

    name = "flex"

    def __init__(self) -> None:
        from torch.nn.attention import flex_attention

        self.create_block_mask = flex_attention.create_block_mask
        self.flex_attention = torch.compile(flex_attention.flex_attention, dynamic=False)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        query, key, value = (x.transpose(1, 2).contiguous() for x in (query, key, value))
        block_mask = None if mask is None else self.block_mask(mask, query.shape[2])
        return self.flex_attention(query, key, value, block_mask=block_mask).transpose(1, 2)

    def block_mask(self, mask: Tensor, queries: int) -> Any:
        """Convert the mask to flex_attention's block mask."""

        def real(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return mask[batch, key]

        return self.create_block_mask(real, mask.shape[0], None, queries, mask.shape[1], device=str(mask.device))


class FlashAttention:
    """flash-attention 4, 3 or 2 (https://arxiv.org/abs/2205.14135), the newest version installed."""

    name = "flash"
    #: module, function, name of the backend
    versions = (
        ("flash_attn.cute", "flash_attn_func", "flash_attn4"),
        ("flash_attn_interface", "flash_attn_func", "flash_attn3"),
        ("flash_attn", "flash_attn_func", "flash_attn2"),
    )

    def __init__(self) -> None:
        for module, function, name in self.versions:
            found = import_optional(module, function)
            if found is not None:
                self.function, self.name = found, name
                return
        raise UsageError(
            "attention=flash: no flash-attention is installed here."
            " Install it with `pip install flash-attn --no-build-isolation` (2; NVIDIA GPU and CUDA toolkit),"
            " `pip install 'flash-attn-4>=4.0.0b36'` (4; Hopper and Blackwell), or use attention=sdpa"
        )

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        refuse_mask("flash", mask)
        output = self.function(query, key, value)
        return output[0] if isinstance(output, tuple) else output


class SageAttention:
    """SageAttention (https://arxiv.org/abs/2411.10958): queries and keys in 8 bits. Faster, but not lossless."""

    name = "sage"

    def __init__(self) -> None:
        function = import_optional("sageattention", "sageattn")
        if function is None or not torch.cuda.is_available():
            raise UsageError(
                "attention=sage needs an NVIDIA GPU and SageAttention 2, and one is missing here. Install it with"
                " `pip install --no-build-isolation git+https://github.com/thu-ml/SageAttention`"
                " (PyPI's 1.0.6 is too old), or use attention=sdpa"
            )
        self.function = function

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        refuse_mask("sage", mask)
        return self.function(query, key, value, tensor_layout="NHD", is_causal=False)


def import_optional(module: str, function: str) -> Callable[..., Any] | None:
    """Return the function, or None if its package is not installed or does not load on this machine."""
    try:
        return getattr(importlib.import_module(module), function, None)
    except (ImportError, OSError, RuntimeError):
        return None


def refuse_mask(name: str, mask: Tensor | None) -> None:
    """Raise `UsageError` for a mask: these kernels would attend to padding, which silently changes the picture."""
    if mask is not None:
        raise UsageError(
            f"attention={name} cannot mask padding, and prompts of different length in one batch need it."
            " Use attention=sdpa, or run the prompts one at a time"
        )
