"""Compilation of the transformer: the options of the `compile` group."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import torch
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from hydrarun.core.errors import UsageError
from hydrarun.models.transformer import Transformer

GRAPHS = 256  # of a block, one per size
CACHE_DIR = "TORCHINDUCTOR_CACHE_DIR"  # torch's own variable

Mode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]


class NoCompile:
    """Run the blocks as they are."""

    name = "none"

    def apply(self, transformer: Transformer, alone: bool = True) -> None:
        """Nothing to do."""


class CompileBlocks:
    """Regional `torch.compile`: all blocks of a class share one compiled graph, so that compiling takes seconds.

    `mode` and `dynamic` are torch.compile's. `cache_dir`: where compiled graphs are kept for later processes; null: the
    folder that TORCHINDUCTOR_CACHE_DIR names, or else one in the user's cache. Raises `UsageError` for a folder that
    cannot be made.
    """

    name = "blocks"

    def __init__(self, mode: Mode = "default", dynamic: bool = False, cache_dir: str | None = None) -> None:
        self.mode = mode
        self.dynamic = dynamic
        set_graph_cache(cache_dir)

    def apply(self, transformer: Transformer, alone: bool = True) -> None:
        """Compile every block in place; a block that cannot be one graph raises at its first call.

        Where ranks work together (not `alone`), the graph breaks at what they send each other.
        """
        raise_graph_limit()
        for block in transformer.all_blocks():
            block.compile(fullgraph=alone, mode=self.mode, dynamic=self.dynamic)


class CompileFull:
    """`torch.compile` of a branch's whole way, from latents to prediction, as one graph.

    A cache that looks between the blocks gets three: what comes before the blocks, the blocks, and what comes behind
    them. Compiling takes about as many times longer than blocks alone as there are blocks. The arguments are those of
    `CompileBlocks`; CUDA graphs are not among the modes, because they overwrite a branch's tokens with the next one's.
    """

    name = "full"
    #: of `Transformer`
    pieces = ("through", "enter", "run", "finish")

    def __init__(
        self,
        mode: Literal["default", "max-autotune-no-cudagraphs"] = "default",
        dynamic: bool = False,
        cache_dir: str | None = None,
    ) -> None:
        self.mode = mode
        self.dynamic = dynamic
        set_graph_cache(cache_dir)

    def apply(self, transformer: Transformer, alone: bool = True) -> None:
        """Compile the forward's pieces in place; one that cannot be one graph raises at its first call."""
        raise_graph_limit()
        for name in self.pieces:
            piece = getattr(transformer, name)
            setattr(transformer, name, torch.compile(piece, fullgraph=True, mode=self.mode, dynamic=self.dynamic))


def raise_graph_limit() -> None:
    """Each length of a prompt is a size of its own, and torch gives up after 8 of them."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)


def set_graph_cache(cache_dir: str | None) -> None:
    """Have torch keep what it compiles in `cache_dir`, for later processes too."""
    # torch sets the variable itself once it is imported, to a temporary folder
    if cache_dir is None and os.environ.get(CACHE_DIR, default_cache_dir()) != default_cache_dir():
        return
    users = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "hydrarun", "compile")
    folder = Path(cache_dir or users).expanduser().resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"compile.cache_dir: {folder}: {error.strerror}; choose another folder") from None
    os.environ[CACHE_DIR] = str(folder)
