"""A real Prometheus (Debian's) that scrapes a cluster under the rules in deploy/prometheus, and what tests ask of it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from backstay.testing import LocalCluster
from backstay.testing.ports import free_port
from backstay.testing.wait import wait_until

DEPLOY = Path(__file__).parents[2] / "deploy" / "prometheus"
STEP = "1s"  # scraped and evaluated so often, so that a test need not wait for minutes
READY_S = 30.0


def require(program: str) -> str:
    """The program's path; without it the test is skipped."""
    found = shutil.which(program)
    if found is None:
        pytest.skip(f"{program} is not installed: apt-get install prometheus")
    return found


class Prometheus:
    """A running server, asked over HTTP."""

    def __init__(self, address: str, log: Path) -> None:
        self.address = address
        self._log = log

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The instant vector (or scalar, as one sample) of ``expression`` now."""
        answer = self.get("/api/v1/query", query=expression)
        data = answer["data"]
        if data["resultType"] == "scalar":
            return [{"metric": {}, "value": data["result"]}]
        return list(data["result"])

    def value(self, expression: str) -> float | None:
        """The value of the only sample; None when there is none."""
        found = self.query(expression)
        assert len(found) <= 1, f"{expression} has {len(found)} samples"
        return float(found[0]["value"][1]) if found else None

    def firing(self) -> set[str]:
        """Names of the alerts that fire."""
        return {sample["metric"]["alertname"] for sample in self.query('ALERTS{alertstate="firing"}')}

    def get(self, path: str, **arguments: str) -> dict[str, Any]:
        url = f"http://{self.address}{path}?{urllib.parse.urlencode(arguments)}"
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return dict(json.load(answer))
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{arguments}: {error.read().decode()}") from error

    def is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://{self.address}/-/ready", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def wait(self, condition: Any, why: str, *, deadline_s: float = 60.0) -> Any:
        """Poll until ``condition()`` is true."""
        return wait_until(condition, deadline_s=deadline_s, why=why, evidence=self._evidence)

    def _evidence(self) -> str:
        return f"{self.query('ALERTS')}\n{self.query('backstay_spares')}\n{self._log.read_text()[-2000:]}"


def configure(cluster: LocalCluster, directory: Path, *, hold: str = "2s") -> Path:
    """deploy/prometheus as an operator would install it, for ``cluster``: its targets, and ``for:`` cut to ``hold``."""
    home = install(directory, hold=hold)
    aim(cluster, home)
    return home / "prometheus.yml"


def install(directory: Path, *, hold: str = "2s", ca: Path | None = None) -> Path:
    """The directory of deploy/prometheus under ``directory``; with ``ca``, daemons are asked over TLS and vouched for by it."""
    home = directory / "prometheus"
    shutil.copytree(DEPLOY, home)
    config = (home / "prometheus.yml").read_text()
    config = re.sub(r"(scrape|evaluation)_interval: \w+", rf"\1_interval: {STEP}", config)
    if ca is not None:
        tls = f"    scheme: https\n    tls_config: {{ca_file: {ca}}}\n"
        config = re.sub(r"(  - job_name: .*\n)", rf"\1{tls}", config)
    (home / "prometheus.yml").write_text(config)
    alerts = home / "rules" / "backstay.alerts.yml"
    alerts.write_text(re.sub(r"\bfor: \w+", f"for: {hold}", alerts.read_text()))
    return home


def aim(cluster: LocalCluster, home: Path) -> None:
    """List the daemons of ``cluster`` as targets, as they are now."""
    nodes = [f"{node.host}:{node.http_port}" for node in cluster.nodes]
    aim_at(home, nodes=nodes, coordinators=[f"127.0.0.1:{cluster.coordinator_http_port}"])


def aim_at(home: Path, *, nodes: Sequence[str], coordinators: Sequence[str]) -> None:
    """List these addresses as targets."""
    for kind, addresses in (("nodes", nodes), ("coordinators", coordinators)):
        (home / "targets" / f"{kind}.yml").write_text(yaml.safe_dump([{"targets": list(addresses)}]))


@contextmanager
def prometheus(config: Path, directory: Path) -> Iterator[Prometheus]:
    """A server over ``config``, with its storage under ``directory``, until the block ends."""
    address, log = f"127.0.0.1:{free_port()}", directory / "prometheus.log"
    command = [
        require("prometheus"), f"--config.file={config}", f"--storage.tsdb.path={directory / 'tsdb'}",
        f"--web.listen-address={address}", "--storage.tsdb.retention.time=1h", "--log.level=warn",
    ]  # fmt: skip
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT) as process:
        server = Prometheus(address, log)
        try:
            wait_until(
                lambda: server.is_ready() and process.poll() is None,
                deadline_s=READY_S, why="Prometheus to be ready", evidence=log.read_text,
            )  # fmt: skip
            yield server
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
