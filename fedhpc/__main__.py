"""`python -m fedhpc` is the command `fedhpc`."""

from __future__ import annotations

import sys

from fedhpc.console import main

if __name__ == "__main__":
    sys.exit(main())
