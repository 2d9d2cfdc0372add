"""`python -m hydrarun`, and the console script `hydrarun`."""

from __future__ import annotations

import sys

from hydrarun.engine.ranks import worker


def main() -> int:
    """Run the command line, or serve rank 0 of torchrun, which does; returns the exit code."""
    if worker.launched() and worker.place().rank > 0:
        worker.follow(sys.argv[1:])
        return 0
    from hydrarun.cli.commands import run as cli  # and Hydra, which no other rank needs

    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
