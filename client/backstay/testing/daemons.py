"""One node and one coordinator of a LocalCluster: names, directories, ports, processes, and their status documents.

Holds the facts and reads their state; starting and killing is the cluster's.
"""

from __future__ import annotations

import http.client
import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from backstay.errors import UnavailableError
from backstay.testing.ports import free_port

HOST: Final = "127.0.0.1"
COORDINATOR: Final = "coordinator"
DAEMON_ROLE: Final = "daemon"
WORK_ROLE: Final = "work"
_HTTP_TIMEOUT_S: Final = 5.0


@dataclass(slots=True, kw_only=True)
class LocalNode:
    """A node. ``directory`` holds everything it owns; deleting it and killing its processes loses the machine."""

    index: int
    name: str
    directory: Path
    http_port: int
    host: str = HOST
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


@dataclass(slots=True, kw_only=True)
class LocalCoordinator:
    """A coordinator. ``advertise`` is where others reach it when that is not where it listens, such as a proxy's address."""

    index: int
    election: str = ""
    advertise: str = ""
    port: int = field(default_factory=free_port)
    http_port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def name(self) -> str:
        return COORDINATOR if self.index == 0 else f"{COORDINATOR}-{self.index}"

    @property
    def listen(self) -> str:
        return f"{HOST}:{self.port}"

    @property
    def address(self) -> str:
        """The address at which nodes and operators reach it."""
        return self.advertise or self.listen

    def arguments(self) -> list[str]:
        """Its individual command-line arguments."""
        argv = ["--listen", self.listen, "--http", f"{HOST}:{self.http_port}"]
        argv += ["--advertise", self.advertise] if self.advertise else []
        return argv + (["--election", self.election] if self.election else [])

    def status(self) -> dict[str, Any]:
        """Its status document, also as a standby; UnavailableError if it does not answer."""
        if self.process is None or self.process.poll() is not None:
            raise UnavailableError(f"{self.name} does not run")
        return fetch_json(HOST, self.http_port, "/status.json")

    def is_leading(self) -> bool:
        """Whether it claims to lead; False if it does not answer."""
        try:
            return bool(self.status()["leader"]["is_leader"])
        except UnavailableError:
            return False


def leading(coordinators: Sequence[LocalCoordinator]) -> LocalCoordinator:
    """The leading coordinator; raises UnavailableError while there is none."""
    for coordinator in coordinators:
        if len(coordinators) == 1 or coordinator.is_leading():
            return coordinator
    raise UnavailableError(f"none of {len(coordinators)} coordinators leads")


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
        raise UnavailableError(f"http://{host}:{port}{path} did not return a JSON object")
    return document
