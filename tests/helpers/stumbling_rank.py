"""A rank that fails on some prompts: rank 1 on `fails on rank 1`."""

from __future__ import annotations

import os
import sys

from hydrarun.core.errors import RunError
from hydrarun.engine import runner
from hydrarun.engine.ranks import worker

run_stages = runner.Runner.run_stages


def stumble(self, stages, state, *arguments, **options):
    if f"fails on rank {os.environ['RANK']}" in state.prompts:
        raise RunError("stumbled")
    return run_stages(self, stages, state, *arguments, **options)


runner.Runner.run_stages = stumble

if __name__ == "__main__":
    worker.main(sys.argv[1:])
