"""Certificates of a LocalCluster, created with `backstay certs` as an operator would, and passed in the environment."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Final

from backstay.errors import ConfigError

# Everything is on this machine's loopback; daemons and commands refuse plaintext unless it is explicitly allowed.
PLAINTEXT: Final = {
    "BACKSTAYD_NODE_INSECURE": "true",
    "BACKSTAYD_COORDINATOR_INSECURE": "true",
    "BACKSTAY_INSECURE": "true",
}


class Certificates:
    """An authority in ``directory`` and the certificates it issued."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def make(self, *nodes: str, has_others: bool = False, days: float = 30.0, host: str = "127.0.0.1") -> None:
        """Issue or renew certificates for ``nodes``, and for coordinator and operator if ``has_others``."""
        argv = [sys.executable, "-m", "backstayd.cli", "certs", "--ca-dir", str(self.directory)]
        argv += ["--days", str(days), "--host", host]
        argv += ["--node", *nodes] if nodes else []
        argv += ["--coordinator", "--operator"] if has_others else []
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ConfigError(f"`backstay certs` ended with status {done.returncode}: {done.stderr.strip()}")

    def of_node(self, name: str) -> dict[str, str]:
        """The environment of a node's daemon; issues its certificate if it has none."""
        if not (self.directory / "node" / name / "tls.crt").exists():
            self.make(name)
        return _environment("BACKSTAYD_NODE", self.directory / "node" / name)

    def of_coordinator(self) -> dict[str, str]:
        """The environment of a coordinator."""
        return _environment("BACKSTAYD_COORDINATOR", self.directory / "coordinator")

    def of_operator(self) -> dict[str, str]:
        """The environment of the operator's command."""
        return _environment("BACKSTAY", self.directory / "operator")


def _environment(prefix: str, directory: Path) -> dict[str, str]:
    return {
        f"{prefix}_INSECURE": "false",
        f"{prefix}_TLS_CERT": str(directory / "tls.crt"),
        f"{prefix}_TLS_KEY": str(directory / "tls.key"),
        f"{prefix}_TLS_CA": str(directory / "ca.crt"),
    }
