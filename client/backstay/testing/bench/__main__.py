"""``python -m backstay.testing.bench``: the same as ``backstay bench``."""

from __future__ import annotations

import sys

from backstay.testing.bench import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
