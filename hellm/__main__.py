"""`python -m hellm` is `hellm`."""

from __future__ import annotations

import sys

from hellm.cli import main

if __name__ == "__main__":
    sys.exit(main())
