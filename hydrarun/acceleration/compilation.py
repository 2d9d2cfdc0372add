"""Compilation of the transformer: the options of the `compile` group."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import torch
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from hydrarun.core.errors import UsageError
from hydrarun.core.files import resolve_path
from hydrarun.models.transformer import Transformer

GRAPHS = 256  # limit of graphs per block, one for each input size
CACHE_DIR = "TORCHINDUCTOR_CACHE_DIR"  # torch's own variable

Mode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]


class NoCompile:
    """Runs the blocks uncompiled."""

    name = "none"

    def apply(self, transformer: Transformer, alone: bool = True) -> None:
        """Do nothing."""


class CompileBlocks:
    """Regional `torch.compile`: all blocks of a class share one compiled graph, so that compiling takes seconds.

    `mode` and `dynamic` are torch.compile's. `cache_dir`: folder of compiled graphs for later processes; null: the
    folder that TORCHINDUCTOR_CACHE_DIR names, or else one in the user's cache. Raises `UsageError` for a folder that
    cannot be created.
    """

    name = "blocks"

    def __init__(self, mode: Mode = "default", dynamic: bool = False, cache_dir: str | None = None) -> None:
        self.mode = mode
        self.dynamic = dynamic
        set_graph_cache(cache_dir)

    def apply(self, transformer: Transformer, alone: bool = True) -> None:
        """Compile every block in place. A block that cannot be one graph raises at its first call.

        With several ranks (not `alone`) the graph breaks at every collective.
        """
        raise_graph_limit()
        for block in transformer.all_blocks():
            block.compile(fullgraph=alone, mode=self.mode, dynamic=self.dynamic)


class CompileFull:
    """`torch.compile` of a branch's whole forward, from latents to prediction, as one graph.

    A cache that reads tokens between the blocks gets three graphs: before the blocks, the blocks, and after them.
    Compile time grows with the number of blocks: N blocks take about N times as long as `CompileBlocks`. The arguments
    are those of `CompileBlocks`, without the CUDA graph modes, which overwrite a branch's tokens with the next one's.
    """

    name = "full"
    #: methods of `Transformer` that are compiled
    pieces = ("forward_branch", "prepare", "run_blocks", "finish_branch")

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
        """Compile the forward's pieces in place. A piece that cannot be one graph raises at its first call."""
        raise_graph_limit()
        for name in self.pieces:
            piece = getattr(transformer, name)
            setattr(transformer, name, torch.compile(piece, fullgraph=True, mode=self.mode, dynamic=self.dynamic))


def raise_graph_limit() -> None:
    """Raise torch's limit of 8 graphs per function: every prompt length needs its own graph."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)


def set_graph_cache(cache_dir: str | None) -> None:
    """Make torch keep compiled graphs in `cache_dir`, also for later processes."""
    # on import torch sets the variable itself, to a temporary folder
    if cache_dir is None and os.environ.get(CACHE_DIR, default_cache_dir()) != default_cache_dir():
        return
    users = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "hydrarun", "compile")
    folder = resolve_path(cache_dir or users)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"compile.cache_dir: {folder}: {error.strerror}; choose another folder") from None
    os.environ[CACHE_DIR] = str(folder)
