"""A real etcd, Debian's, as one process on this machine, that tests may kill, freeze and start again over its data."""

from __future__ import annotations

import shutil
import signal
import ssl
import subprocess
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlencode

import pytest
import trustme

from backstay.errors import UnavailableError
from backstay.testing.ports import free_port
from backstay.testing.wait import wait_until

ETCD = shutil.which("etcd")
needs_etcd = pytest.mark.skipif(ETCD is None, reason="etcd is not installed: apt-get install etcd-server")


def etcd_argv(data: Path, address: str, peer: str, files: Mapping[str, str]) -> list[str]:
    """One member that clients reach at ``address``; both sides show certificates if it is given ``files``."""
    client = f"{'https' if files else 'http'}://{address}"
    argv = ["etcd", "--data-dir", str(data), "--log-level", "error"]
    argv += ["--listen-client-urls", client, "--advertise-client-urls", client, "--listen-peer-urls", peer]
    argv += ["--initial-advertise-peer-urls", peer, "--initial-cluster", f"default={peer}"]
    if files:
        argv += ["--client-cert-auth", "--trusted-ca-file", files["ca"]]
        argv += ["--cert-file", files["cert"], "--key-file", files["key"]]
    return argv


def issue(authority: trustme.CA, host: str, files: Mapping[str, str]) -> None:
    """Write a certificate for ``host``, its key and its authority into ``files``."""
    certificate = authority.issue_cert(host)
    authority.cert_pem.write_to_path(files["ca"])
    certificate.private_key_pem.write_to_path(files["key"])
    certificate.cert_chain_pems[0].write_to_path(files["cert"])


class Etcd:
    """One member. ``address`` stays the same over restarts. ``is_tls``: both sides show certificates."""

    def __init__(self, directory: Path, *, is_tls: bool = False) -> None:
        self._directory = directory
        self._is_tls = is_tls
        self.address = f"127.0.0.1:{free_port()}"
        self._peer = f"http://127.0.0.1:{free_port()}"
        self._process: subprocess.Popen[bytes] | None = None

    def url(self, prefix: str) -> str:
        """As the setting ``election``."""
        return f"etcd://{self.address}/{prefix}{'?' + urlencode(self.files('client')) if self._is_tls else ''}"

    def files(self, who: str) -> dict[str, str]:
        """Certificate, key and authority of ``server`` or ``client``, as options of the URL name them."""
        return {name: str(self._directory / f"{who}.{name}") for name in ("ca", "cert", "key")}

    def start(self) -> None:
        files = self._make_certificates() if self._is_tls else {}
        argv = etcd_argv(self._directory / "data", self.address, self._peer, files)
        with (self._directory / "etcd.log").open("ab") as log:
            self._process = subprocess.Popen(argv, stdout=log, stderr=log, start_new_session=True)
        wait_until(self._is_healthy, deadline_s=60, why="etcd to be healthy")

    def _make_certificates(self) -> dict[str, str]:
        authority = trustme.CA()
        for who in ("server", "client"):
            issue(authority, "127.0.0.1", self.files(who))
        return self.files("server")

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
        context = None
        if self._is_tls:
            files = self.files("client")
            context = ssl.create_default_context(cafile=files["ca"])
            context.load_cert_chain(files["cert"], files["key"])
        scheme = "https" if self._is_tls else "http"
        try:
            with urllib.request.urlopen(f"{scheme}://{self.address}/health", timeout=2, context=context) as answer:
                return b"true" in answer.read()
        except OSError as error:
            raise UnavailableError(str(error)) from error


@contextmanager
def running_etcd(directory: Path, *, is_tls: bool = False) -> Iterator[Etcd]:
    etcd = Etcd(directory, is_tls=is_tls)
    try:
        etcd.start()
        yield etcd
    finally:
        etcd.kill()
