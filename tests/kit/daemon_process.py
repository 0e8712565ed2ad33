"""One ``backstayd`` started as an operator would, with its own words on stderr to look at."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backstay.testing.cluster import process_environment
from backstay.testing.daemons import fetch_json
from backstay.testing.wait import wait_until
from tests.kit.wording import facts_of, says

DEADLINE_S = 60.0
# A test of one mistake must not make others: ports are free ones, and nobody else's coordinator is called.
ANYWHERE = {
    "node": {"BULK": "127.0.0.1:0", "HTTP": "127.0.0.1:0", "COORDINATOR": "127.0.0.1:9", "INSECURE": "true"},
    "coordinator": {"LISTEN": "127.0.0.1:0", "HTTP": "127.0.0.1:0", "INSECURE": "true"},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningDaemon:
    """``log`` is the file its stderr goes to."""

    process: subprocess.Popen[bytes]
    log: Path

    def wait_for_line(self, key: str, *, deadline_s: float = DEADLINE_S, **facts: object) -> dict[str, str]:
        """Wait for the sentence of ``key`` in the log, with these facts; the other facts that stand in it."""

        def is_there() -> bool:
            status, log = self.process.poll(), self.log.read_text(encoding="utf-8")
            assert says(key, log, **facts) or status is None, f"ended with {status}: {log}"
            return says(key, log, **facts)

        wait_until(is_there, deadline_s=deadline_s, why=f"{key} {facts or ''}", evidence=self.log.read_text)
        return facts_of(key, self.log.read_text(encoding="utf-8"), **facts)

    @property
    def http(self) -> str:
        """``host:port`` of its HTTP server, once it serves."""
        return self.wait_for_line("http_served")["http"]

    def status(self) -> dict[str, Any]:
        """Its status document."""
        host, _, port = self.http.rpartition(":")
        return fetch_json(host, int(port), "/status.json")


def environment_of(role: str, extra: Mapping[str, str]) -> dict[str, str]:
    settings = {f"BACKSTAYD_{role.upper()}_{name}": value for name, value in ANYWHERE[role].items()}
    return process_environment() | settings | dict(extra)


@contextlib.contextmanager
def running_daemon(
    role: str, *arguments: str, directory: Path, env: Mapping[str, str] | None = None, command: tuple[str, ...] = ()
) -> Iterator[RunningDaemon]:
    """A daemon as long as the ``with`` lasts; it is ended by SIGKILL if it does not end by SIGTERM.

    Args:
        directory: Where its log, ``<role>.log``, goes.
        command: What it is started through, such as ``("setpriv", "--reuid=7")``.
    """
    log = directory / f"{role}.log"
    argv = [*command, sys.executable, "-m", "backstayd", role, *arguments]
    with log.open("wb") as stderr:
        process = subprocess.Popen(argv, stderr=stderr, env=environment_of(role, env or {}))
    try:
        yield RunningDaemon(process=process, log=log)
    finally:
        process.terminate()
        try:
            process.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def finished_daemon(
    role: str, *arguments: str, env: Mapping[str, str] | None = None, command: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """A daemon that ends by itself, soon."""
    argv = [*command, sys.executable, "-m", "backstayd", role, *arguments]
    environment = environment_of(role, env or {})
    return subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
