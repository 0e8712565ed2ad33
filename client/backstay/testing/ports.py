"""Free TCP ports below the kernel's ephemeral range, so that no outgoing connection takes one before it is used."""

from __future__ import annotations

import random
import socket
from typing import Final

from backstay.errors import CapacityError

_FIRST_PORT: Final = 20000
_LAST_PORT: Final = 31999
_handed_out: set[int] = set()


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nobody listens on and that this process has not returned before."""
    for _ in range(500):
        port = random.SystemRandom().randint(_FIRST_PORT, _LAST_PORT)
        if port in _handed_out:
            continue
        with socket.socket() as probe:
            try:
                probe.bind((host, port))
            except OSError:
                continue
        _handed_out.add(port)
        return port
    raise CapacityError(f"no free TCP port found between {_FIRST_PORT} and {_LAST_PORT} in 500 tries")
