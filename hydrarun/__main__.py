"""`python -m hydrarun`, and the console script `hydrarun`."""

from __future__ import annotations

import sys

from hydrarun.cli import main

if __name__ == "__main__":
    sys.exit(main())
