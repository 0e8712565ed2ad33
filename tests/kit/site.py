"""A site as docs/install-systemd.md, standby.md and runbooks/README.md have it: machines, certificates, etcd, Prometheus.

Everything that follows from those pages stands in configuration files, as an operator would write them; nothing is handed over
by flags. Starts and names things, breaks nothing by itself.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import ssl
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import trustme

from backstay.errors import UnavailableError
from backstay.testing.ports import free_port
from backstay.testing.wait import wait_until
from tests.kit.etcd import etcd_argv, issue
from tests.kit.machines import Machine, Network
from tests.kit.prometheus import Prometheus, aim_at, install, require

TRAINER = Path(__file__).with_name("trainer_script.py")
LEASE_S = 1.0
ELECTION_LEASE_S = 2.0
START_S = 60.0
_NODE = """\
[node]
name = "{name}"
coordinator = "{coordinators}"
bulk = "{address}:7071"
http = "0.0.0.0:7072"
lease_s = {lease}
"""
_COORDINATOR = """\
[coordinator]
listen = "0.0.0.0:7070"
advertise = "{address}:7070"
http = "0.0.0.0:7073"
election = "{election}"
election_lease_s = {election_lease}
parity = {parity}
lease_s = {lease}
"""
_TLS = """\
tls_cert = "{directory}/tls.crt"
tls_key = "{directory}/tls.key"
tls_ca = "{directory}/ca.crt"
http_tls = true
"""


class Site:
    """Coordinators ``coord-0`` and up, nodes ``node-0`` and up, and ``watch`` with etcd and Prometheus, each a machine."""

    def __init__(self, network: Network, directory: Path, *, nodes: int, coordinators: int, parity: int) -> None:
        self.directory = directory
        self._network = network
        self._parity = parity
        self._ca = directory / "ca"
        self.watch = network.add("watch", 1)
        self.coordinators = [network.add(f"coord-{index}", 2 + index) for index in range(coordinators)]
        self._node_count = 0
        hosts = [argument for machine in self.coordinators for argument in ("--host", machine.address)]
        self._certify("--coordinator", "--operator", *hosts)
        self._election = self._start_etcd()
        for machine in self.coordinators:
            self.start_coordinator(machine)
        self.nodes = [self.add_node() for _ in range(nodes)]
        self.prometheus = self._start_prometheus()

    def _certify(self, *arguments: str) -> None:
        argv = [sys.executable, "-m", "backstayd.cli", "certs", "--ca-dir", str(self._ca), *arguments]
        done = self.watch.run(argv)
        assert done.returncode == 0, done.stderr

    # -- daemons ------------------------------------------------------------------------------------------------------

    @property
    def addresses(self) -> str:
        """What nodes and operators are told."""
        return ",".join(f"{machine.address}:7070" for machine in self.coordinators)

    def start_coordinator(self, machine: Machine) -> None:
        text = _COORDINATOR.format(
            address=machine.address, election=self._election, election_lease=ELECTION_LEASE_S, parity=self._parity,
            lease=LEASE_S,
        )  # fmt: skip
        self._start("coordinator", machine, text + _TLS.format(directory=self._ca / "coordinator"))

    def add_node(self) -> Machine:
        """An empty machine with a daemon on it."""
        name = f"node-{self._node_count}"
        machine = self._network.add(name, 10 + self._node_count)
        self._node_count += 1
        self._certify("--node", name, "--host", machine.address)
        text = _NODE.format(name=name, coordinators=self.addresses, address=machine.address, lease=LEASE_S)
        self._start("node", machine, text + _TLS.format(directory=self._ca / "node" / name))
        return machine

    def _start(self, role: str, machine: Machine, text: str) -> None:
        config = self.directory / f"{machine.name}.toml"
        config.write_text(text)
        argv = [sys.executable, "-m", "backstayd", role, "--config", str(config)]
        machine.spawn(argv, name=machine.name, role="daemon")

    # -- what stands beside them --------------------------------------------------------------------------------------

    def _start_etcd(self) -> str:
        """etcd with certificates of its own; returns the setting ``election``."""
        home, address = self.directory / "etcd", self.watch.address
        home.mkdir()
        files = {name: str(home / f"{name}.pem") for name in ("ca", "cert", "key")}
        issue(trustme.CA(), address, files)
        argv = etcd_argv(home / "data", f"{address}:2379", f"http://{address}:2380", files)
        self.watch.spawn(argv, name="etcd")
        return f"etcd://{address}:2379/backstay?" + "&".join(f"{name}={path}" for name, path in files.items())

    def _start_prometheus(self) -> Prometheus:
        home = install(self.directory, ca=self._ca / "ca.crt")
        self.aim()
        address = f"{self.watch.address}:9090"
        argv = [require("prometheus"), f"--config.file={home / 'prometheus.yml'}", f"--web.listen-address={address}"]
        argv += [f"--storage.tsdb.path={self.directory / 'tsdb'}", "--log.level=warn"]
        self.watch.spawn(argv, name="prometheus")
        server = Prometheus(address, self._network.keeper.log_dir / "prometheus.log")
        self.wait(server.is_ready, "Prometheus to be ready")
        return server

    def aim(self) -> None:
        """List the machines as Prometheus' targets, as they are now."""
        aim_at(
            self.directory / "prometheus",
            nodes=[f"{machine.address}:7072" for machine in self.nodes],
            coordinators=[f"{machine.address}:7073" for machine in self.coordinators],
        )

    # -- what is seen -------------------------------------------------------------------------------------------------

    def page(self, machine: Machine, path: str) -> str:
        """What a coordinator's HTTP server answers over TLS; UnavailableError when it does not."""
        context = ssl.create_default_context(cafile=str(self._ca / "ca.crt"))
        try:
            with urllib.request.urlopen(f"https://{machine.address}:7073{path}", timeout=5, context=context) as answer:
                return bytes(answer.read()).decode()
        except OSError as error:
            raise UnavailableError(f"{machine.name}: {error}") from error

    def leader(self) -> Machine:
        """The coordinator that says that it leads; UnavailableError while none does."""
        for machine in self.coordinators:
            with contextlib.suppress(UnavailableError):
                if json.loads(self.page(machine, "/status.json"))["leader"]["is_leader"]:
                    return machine
        raise UnavailableError("no coordinator leads")

    def status(self) -> dict[str, Any]:
        """The leader's status document, as its page reads it."""
        return dict(json.loads(self.page(self.leader(), "/status.json")))

    def run_status(self, run: str) -> dict[str, Any]:
        for entry in self.status()["runs"]:
            if entry["run"] == run:
                return dict(entry)
        raise UnavailableError(f"{run} is not known yet")

    def states(self) -> dict[str, str]:
        """Each node's state as the leader has it."""
        return {entry["name"]: entry["state"] for entry in self.status()["nodes"]}

    def backstay(self, *arguments: str, on: Machine | None = None) -> subprocess.CompletedProcess[str]:
        """The operator's command, with certificates, told of all coordinators."""
        files = self._ca / "operator"
        env = {
            "BACKSTAY_COORDINATOR": self.addresses, "BACKSTAY_TLS_CERT": str(files / "tls.crt"),
            "BACKSTAY_TLS_KEY": str(files / "tls.key"), "BACKSTAY_TLS_CA": str(files / "ca.crt"),
        }  # fmt: skip
        return (on or self.watch).run([sys.executable, "-m", "backstayd.cli", *arguments], env)

    # -- trainers -----------------------------------------------------------------------------------------------------

    def train(self, run_id: str, machines: Sequence[Machine]) -> list[subprocess.Popen[bytes]]:
        """One rank on each machine; it finds its daemon where every trainer looks. See :meth:`lines`."""
        shared = {
            "world_size": len(machines), "port": free_port(), "address": machines[0].address, "run_id": run_id,
            "stop": str(self.directory / "stop"), "last_step": 1_000_000, "pause_s": 0.1, "is_attached": True,
        }  # fmt: skip
        started = []
        for rank, machine in enumerate(machines):
            options = {**shared, "rank": rank, "log": str(self.directory / f"rank-{rank}.log")}
            argv = [sys.executable, str(TRAINER), json.dumps(options)]
            env = {"GLOO_SOCKET_IFNAME": "eth0"}
            started.append(machine.spawn(argv, name=f"rank-{rank}", role="trainer", env=env))
        return started

    def lines(self, rank: int) -> list[dict[str, Any]]:
        """What the trainers of a rank noted, the first world's first."""
        log = self.directory / f"rank-{rank}.log"
        whole = log.read_text().splitlines(keepends=True) if log.exists() else []
        return [json.loads(line) for line in whole if line.endswith("\n")]

    def wait(self, condition: Any, why: str, *, deadline_s: float = START_S) -> Any:
        return wait_until(condition, deadline_s=deadline_s, why=why, evidence=self._network.keeper.logs)


def missing() -> str:
    """Which program a site needs and is not here; empty when there is none."""
    packages = {"etcd": "etcd-server", "prometheus": "prometheus"}
    absent = [package for program, package in packages.items() if shutil.which(program) is None]
    return f"not installed: apt-get install {' '.join(absent)}" if absent else ""
