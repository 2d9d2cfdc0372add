"""Entry point of `python -m hydrarun` and of the console script `hydrarun`."""

from __future__ import annotations

import sys
from contextlib import suppress

from hydrarun.core.distributed.rank import is_rank, rank_info
from hydrarun.core.errors import UsageError
from hydrarun.core.printable import printable_output


def main() -> int:
    """Run the command line and return the exit code. Under torchrun, ranks above 0 serve rank 0 instead."""
    if is_rank() and rank_info().rank > 0:
        serve_torchrun(sys.argv[1:])
        return 0
    from hydrarun.cli.main import main as run_command  # imports Hydra, which only rank 0 needs

    return run_command()


def serve_torchrun(argv: list[str]) -> None:
    """Serve jobs as a torchrun rank above 0. It has rank 0's command line; rank 0 reports the mistakes in it."""
    from hydrarun.cli.arguments import parse_arguments
    from hydrarun.config import targets
    from hydrarun.engine.ranks import torchrun, worker

    with suppress(UsageError):
        for name in parse_arguments(argv).targets:
            targets.allow_target(name)
    with printable_output():
        store = torchrun.open_store()
        worker.serve_rank(torchrun.TorchrunLink(store), store)


if __name__ == "__main__":
    sys.exit(main())
