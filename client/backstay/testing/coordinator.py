"""One coordinator of a LocalCluster: its ports, its process, and where others reach it.

Holds the facts and reads its state; starting and killing is the cluster's.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from backstay.errors import UnavailableError
from backstay.testing.node import fetch_json
from backstay.testing.ports import free_port

COORDINATOR: Final = "coordinator"
_HOST: Final = "127.0.0.1"


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
        return f"{_HOST}:{self.port}"

    @property
    def address(self) -> str:
        """Where nodes and operators reach it."""
        return self.advertise or self.listen

    def arguments(self) -> list[str]:
        """Its own part of the command line."""
        argv = ["--listen", self.listen, "--http", f"{_HOST}:{self.http_port}"]
        argv += ["--advertise", self.advertise] if self.advertise else []
        return argv + (["--election", self.election] if self.election else [])

    def status(self) -> dict[str, Any]:
        """Its status document, also of one that stands by; UnavailableError when it does not answer."""
        if self.process is None or self.process.poll() is not None:
            raise UnavailableError(f"{self.name} does not run")
        return fetch_json(_HOST, self.http_port, "/status.json")

    def is_leading(self) -> bool:
        """Whether it says that it leads; False when it does not answer."""
        try:
            return bool(self.status()["leader"]["is_leader"])
        except UnavailableError:
            return False


def leading(coordinators: Sequence[LocalCoordinator]) -> LocalCoordinator:
    """The one that leads; raises UnavailableError while there is none."""
    for coordinator in coordinators:
        if len(coordinators) == 1 or coordinator.is_leading():
            return coordinator
    raise UnavailableError(f"none of {len(coordinators)} coordinators leads")
