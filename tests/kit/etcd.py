"""A real etcd, Debian's, as one process on this machine, that tests may kill, freeze and start again over its data."""

from __future__ import annotations

import shutil
import signal
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from backstay.errors import UnavailableError
from backstay.testing.ports import free_port
from backstay.testing.wait import wait_until

ETCD = shutil.which("etcd")
needs_etcd = pytest.mark.skipif(ETCD is None, reason="etcd is not installed: apt-get install etcd-server")


class Etcd:
    """One member. ``address`` stays the same over restarts."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.address = f"127.0.0.1:{free_port()}"
        self._peer = f"http://127.0.0.1:{free_port()}"
        self._process: subprocess.Popen[bytes] | None = None

    def url(self, prefix: str) -> str:
        """As the setting ``election``."""
        return f"etcd://{self.address}/{prefix}"

    def start(self) -> None:
        assert ETCD is not None
        client = f"http://{self.address}"
        argv = [ETCD, "--data-dir", str(self._directory / "data"), "--log-level", "error"]
        argv += ["--listen-client-urls", client, "--advertise-client-urls", client, "--listen-peer-urls", self._peer]
        argv += ["--initial-advertise-peer-urls", self._peer, "--initial-cluster", f"default={self._peer}"]
        with (self._directory / "etcd.log").open("ab") as log:
            self._process = subprocess.Popen(argv, stdout=log, stderr=log, start_new_session=True)
        wait_until(self._is_healthy, deadline_s=60, why="etcd to be healthy")

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def freeze(self) -> None:
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def _is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://{self.address}/health", timeout=2) as answer:
                return b"true" in answer.read()
        except OSError as error:
            raise UnavailableError(str(error)) from error


@contextmanager
def running_etcd(directory: Path) -> Iterator[Etcd]:
    etcd = Etcd(directory)
    try:
        etcd.start()
        yield etcd
    finally:
        etcd.kill()
