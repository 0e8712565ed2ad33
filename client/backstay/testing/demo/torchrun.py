"""Processes of torchrun: an agent whose trainers start quickly, and the rendezvous store, outside every node.

Run as a file so that the control run imports nothing of backstay: ``python -P torchrun.py <torchrun flags> train.py`` imports
what trainers need, then runs torch's own agent, which forks them; ``python -P torchrun.py store HOST PORT`` is the store.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
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


def run_agent() -> None:
    for name in (*_PRELOADED, *filter(None, os.environ.get("DEMO_PRELOAD", "").split(","))):
        importlib.import_module(name)
    from torch.distributed import run

    run.main()


def run_store(host: str, port: str) -> None:
    from torch._C._distributed_c10d import TCPStore

    store = TCPStore(host, int(port), is_master=True, wait_for_workers=False)
    print("up", store.port, flush=True)
    signal.pause()


if __name__ == "__main__":
    if sys.argv[1] == "store":
        run_store(*sys.argv[2:4])
    else:
        run_agent()
