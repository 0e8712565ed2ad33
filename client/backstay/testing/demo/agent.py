"""A torchrun agent whose trainers start quickly: imports what they need, then runs torch's own agent, which forks them.

Run as a file, ``python -P agent.py <torchrun flags> train.py``, so that the control run imports nothing of backstay.
"""

from __future__ import annotations

import importlib
import os
from typing import Final

_PRELOADED: Final = (
    "numpy",
    "torch",
    "torch.distributed.run",
    "torch.distributed.fsdp",
    "torch.distributed.device_mesh",
    "torch.distributed.tensor",
    "torch._dynamo",
    "torch._inductor",
)


def main() -> None:
    for name in (*_PRELOADED, *filter(None, os.environ.get("DEMO_PRELOAD", "").split(","))):
        importlib.import_module(name)
    from torch.distributed import run

    run.main()


if __name__ == "__main__":
    main()
