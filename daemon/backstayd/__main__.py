"""``python -m backstayd`` is ``backstayd``."""

import sys

from backstayd.app import main

sys.exit(main())
