"""``python -m memtx``: the same program as the script ``memtx``."""

from __future__ import annotations

import sys

from memtx.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
