"""`python -m hydrarun`, and the console script `hydrarun`."""

from __future__ import annotations

import os
import sys


def main() -> int:
    """Run the command line, or serve rank 0 of torchrun, which does; returns the exit code."""
    if os.environ.get("RANK", "0") != "0":
        from hydrarun import worker

        worker.follow(sys.argv[1:])
        return 0
    from hydrarun import cli

    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
