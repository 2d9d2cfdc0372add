"""A rank that stumbles over some prompts: `fails on rank 1` does."""

from __future__ import annotations

import os
import sys

from hydrarun.core.errors import RunError
from hydrarun.engine import runner
from hydrarun.engine.ranks import worker

play = runner.Runner.play


def stumble(self, stages, state, *arguments, **options):
    if f"fails on rank {os.environ['RANK']}" in state.prompts:
        raise RunError("stumbled")
    return play(self, stages, state, *arguments, **options)


runner.Runner.play = stumble

if __name__ == "__main__":
    worker.main(sys.argv[1:])
