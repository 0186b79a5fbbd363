"""`python -m rankwise`, and `torchrun -m rankwise train` for several workers."""

from __future__ import annotations

import sys

from rankwise.cli import main

if __name__ == "__main__":
    sys.exit(main())
