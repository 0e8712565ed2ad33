"""One node of a LocalCluster: what stands for a machine: a name, a tmpfs directory, a socket, ports, processes.

Holds the facts and reads the node's state; starting and killing is the cluster's.
"""

from __future__ import annotations

import http.client
import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from backstay.errors import UnavailableError

DAEMON_ROLE: Final = "daemon"
WORK_ROLE: Final = "work"
_HTTP_TIMEOUT_S: Final = 5.0


@dataclass(slots=True, kw_only=True)
class LocalNode:
    """A node. ``directory`` holds all it owns; deleting it and killing its processes is the loss of the machine."""

    index: int
    name: str
    directory: Path
    http_port: int
    host: str = "127.0.0.1"
    domain: str = ""
    daemon: subprocess.Popen[bytes] | None = None
    is_destroyed: bool = False

    @property
    def memory_dir(self) -> Path:
        return self.directory / "memory"

    @property
    def socket(self) -> Path:
        return self.directory / "sock"

    def status(self) -> dict[str, Any]:
        """The daemon's own status document; raises UnavailableError when it does not answer."""
        return fetch_json(self.host, self.http_port, "/status.json")

    def files(self) -> dict[str, int]:
        """Every file in the node's memory as it is now: path relative to the memory directory → bytes."""
        found: dict[str, int] = {}
        for folder, _folders, names in os.walk(self.memory_dir):
            for name in names:
                path = Path(folder, name)
                try:
                    found[path.relative_to(self.memory_dir).as_posix()] = path.stat().st_size
                except FileNotFoundError:
                    continue  # renamed or unlinked between listing and stat
        return dict(sorted(found.items()))

    def is_daemon_running(self) -> bool:
        return self.daemon is not None and self.daemon.poll() is None


def fetch_json(host: str, port: int, path: str) -> dict[str, Any]:
    """GET a JSON document; raises UnavailableError for anything but an answer with status 200."""
    connection = http.client.HTTPConnection(host, port, timeout=_HTTP_TIMEOUT_S)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        body = response.read()
        if response.status != 200:
            raise UnavailableError(f"http://{host}:{port}{path} answered {response.status}: {body[:200]!r}")
        document = json.loads(body)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise UnavailableError(f"http://{host}:{port}{path} did not answer: {error!r}") from error
    finally:
        connection.close()
    if not isinstance(document, dict):
        raise UnavailableError(f"http://{host}:{port}{path} answered no JSON object")
    return document
