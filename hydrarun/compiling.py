"""Compilation of the transformer's blocks: the options of the `compile` group."""

from __future__ import annotations

from typing import Literal

import torch

from hydrarun.transformer import Transformer

GRAPHS = 256  # of a block, one per size

Mode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]


class NoCompile:
    """Run the blocks as they are."""

    name = "none"

    def apply(self, transformer: Transformer, alone: bool = True) -> None:
        """Nothing to do."""


class CompileBlocks:
    """Regional `torch.compile`: all blocks of a class share one compiled graph, so that compiling takes seconds.

    `mode` and `dynamic` are torch.compile's.
    """

    name = "blocks"

    def __init__(self, mode: Mode = "default", dynamic: bool = False) -> None:
        self.mode = mode
        self.dynamic = dynamic

    def apply(self, transformer: Transformer, alone: bool = True) -> None:
        """Compile every block in place; a block that cannot be one graph raises at its first call.

        Where ranks work together (not `alone`), the graph breaks at what they send each other.
        """
        # each length of a prompt is a size of its own, and torch gives up after 8 of them
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
        for block in transformer.all_blocks():
            block.compile(fullgraph=alone, mode=self.mode, dynamic=self.dynamic)
