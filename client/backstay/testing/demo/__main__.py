"""``python -m backstay.testing.demo``: the demo as a program."""

import sys

from backstay.testing.demo import main

if __name__ == "__main__":
    sys.exit(main())
