"""``python -m backstayd.cli`` is ``backstay``."""

import sys

from backstayd.cli import main

sys.exit(main())
