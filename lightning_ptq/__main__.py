"""The command line as a module: python -m lightning_ptq"""

from __future__ import annotations

import sys

from lightning_ptq.cli import main

if __name__ == "__main__":
    sys.exit(main())
