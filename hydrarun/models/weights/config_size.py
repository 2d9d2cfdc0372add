"""Compares the sizes that a config.json asks for with the weights beside it, before modules take memory and time."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from hydrarun.core.errors import RunError, UsageError
from hydrarun.models.weights.safetensors import Checkpoint

M = TypeVar("M", bound=nn.Module)

#: keys whose value is a number of layers or experts, each a module; some configs set it higher than the model has
COUNT = re.compile(r"(?:^|_)(?:layers|blocks|depths?|experts)(?:_|$)")
MAX_COUNT = 1000

#: most parameters of a module whose weights are not known
MAX_PARAMETERS = 50_000

#: elements of parameters and buffers that need not be in a file, such as tables of positions
SPARE_ELEMENTS = 2**24


def check_counts(where: str, config: Any, tensors: int = 0) -> None:
    """Raise `RunError` for a number of layers that is above `MAX_COUNT` and above the number of `tensors`.

    Libraries make a list entry of each layer even before they build a module.
    """
    for key, value in _list_counts(config, ""):
        if value > max(MAX_COUNT, tensors):
            held = f"the weights hold {tensors} tensors" if tensors else f"at most {MAX_COUNT} are built"
            raise RunError(f"{where}: {key}: {str(value)[:20]}, and {held}")


def build_on_meta(where: str, build: Callable[[], M], most: int = MAX_PARAMETERS) -> M:
    """Build a module on the meta device, where its weights take no memory.

    Raises `RunError`, which names `where` its config stands, for more than `most` parameters, and for sizes that the
    constructor rejects.
    """
    try:
        with torch.device("meta"), _limit_parameters(where, most), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about sizes of 0, which are refused below
            module = build()
            if empty := next((name for name, value in module.named_parameters() if not value.numel()), None):
                raise RunError(f"{where}: asks for no numbers in {empty}")
            return module
    except (RunError, UsageError, MemoryError):
        raise
    except Exception as error:  # the config may be a stranger's: constructors raise nearly anything for wrong sizes
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise RunError(f"{where}: no model can be built with these values: {said[0]}") from error


def limit_parameter_count(checkpoint: Checkpoint) -> int:
    """Return the most parameters of a module with these weights. Constructors may replace some that they made."""
    return MAX_COUNT + 2 * len(checkpoint.headers)


def check_module_fit(where: str, module: nn.Module, checkpoint: Checkpoint) -> None:
    """Raise `RunError` for a module on the meta device that is larger than its weights, or integers in their place."""
    wanted = sum(tensor.numel() for tensors in (module.parameters(), module.buffers()) for tensor in tensors)
    held = sum(map(math.prod, checkpoint.shapes.values()))
    if wanted > 2 * held + SPARE_ELEMENTS:
        raise RunError(f"{where}: asks for {wanted} numbers, and the weights hold {held}")
    leaves = {name.rpartition(".")[2] for name, _ in module.named_parameters()}
    for name, header in checkpoint.headers.items():  # buffers, such as positions, may be integers
        if name.rpartition(".")[2] in leaves:
            header.require_float(name)


@contextmanager
def _limit_parameters(where: str, most: int) -> Iterator[None]:
    count = 0

    def check(*_: Any) -> None:
        nonlocal count
        count += 1
        if count > most:
            raise RunError(f"{where}: asks for more than {most} parameters, and the weights hold fewer tensors")

    hook = register_module_parameter_registration_hook(check)
    try:
        yield
    finally:
        hook.remove()


def _list_counts(node: Any, key: str) -> Iterator[tuple[str, int]]:
    if isinstance(node, dict):
        for name, value in node.items():
            yield from _list_counts(value, name)
    elif isinstance(node, list):
        for value in node:
            yield from _list_counts(value, key)
    elif isinstance(node, int) and COUNT.search(key):
        yield key, node
