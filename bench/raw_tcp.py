"""The sending half of the raw TCP baseline: a process that answers each connection with one file by sendfile.

Prints its port, serves until its standard input closes. Standard library only.
"""

from __future__ import annotations

import os
import socket
import sys
import threading


def serve(path: str) -> None:
    """Send the whole of ``path`` to whoever connects, one after another."""
    with socket.create_server(("127.0.0.1", 0)) as listener, open(path, "rb") as file:
        print(listener.getsockname()[1], flush=True)
        threading.Thread(target=_exit_with_parent, daemon=True).start()
        size = os.fstat(file.fileno()).st_size
        while True:
            connection, _address = listener.accept()
            with connection:
                sent = 0
                while sent < size:
                    sent += os.sendfile(connection.fileno(), file.fileno(), sent, size - sent)


def _exit_with_parent() -> None:
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    serve(sys.argv[1])
