"""The rendezvous store of the torchrun agents, in a process outside every node: ``python -P store.py HOST PORT``."""

from __future__ import annotations

import signal
import sys

from torch._C._distributed_c10d import TCPStore


def main(host: str, port: str) -> None:
    store = TCPStore(host, int(port), is_master=True, wait_for_workers=False)
    print("up", store.port, flush=True)
    signal.pause()


if __name__ == "__main__":
    main(*sys.argv[1:3])
