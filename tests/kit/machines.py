"""Machines on one machine: network and mount namespaces with an address and a /run of their own, on one switch.

A machine is a process that sleeps in its namespaces; whatever else runs there has joined them. When its processes are dead the
kernel takes its links, its tmpfs and all that lay there, so nothing is left behind however a test ends. Needs root. Knows
nothing of what runs on a machine.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from backstay.testing.cluster import process_environment
from backstay.testing.guardian import guarded
from backstay.testing.processes import ProcessKeeper, signal_processes
from backstay.testing.wait import wait_until

SWITCH = "switch"
MEMORY_DIR = "/run/backstay/memory"
_NEEDED = ("ip", "unshare", "nsenter", "mount")
_BOOT = (
    "mount -t tmpfs run /run && mkdir -p {memory} && mount -t tmpfs -o size={size},mode=0700 backstay {memory} && "
    "ip link set lo up && exec sleep infinity"
)


def why_not() -> str:
    """Why machines cannot be had here; empty when they can."""
    if os.geteuid() != 0:
        return "network and mount namespaces need root"
    if missing := [program for program in _NEEDED if shutil.which(program) is None]:
        return f"not installed: {', '.join(missing)} (apt-get install iproute2 util-linux)"
    probe = "ip link add b0 type bridge && ip link add v0 type veth peer name v1 && mount -t tmpfs probe /run"
    done = subprocess.run(["unshare", "-mn", "sh", "-c", probe], capture_output=True, text=True, check=False)
    return f"namespaces are not allowed here: {done.stderr.strip()}" if done.returncode else ""


def _environment(env: Mapping[str, str] | None) -> dict[str, str]:
    """A fresh machine's: none of what tests are told of backstay."""
    ours = {name: value for name, value in process_environment().items() if not name.startswith("BACKSTAY")}
    return ours | dict(env or {})


class Machine:
    """One machine. ``address`` is its only one; files of the machine that tests run on are seen, but for /run."""

    def __init__(self, name: str, address: str, holder: subprocess.Popen[bytes], keeper: ProcessKeeper) -> None:
        self.name = name
        self.address = address
        self._holder = holder
        self._keeper = keeper

    @property
    def _enter(self) -> list[str]:
        return ["nsenter", f"--net=/proc/{self._holder.pid}/ns/net", f"--mount=/proc/{self._holder.pid}/ns/mnt", "--"]

    def spawn(
        self, argv: Sequence[str], *, name: str, role: str = "", env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a process there; its output goes to ``<name>.log``."""
        environment = _environment(env)
        return self._keeper.spawn([*self._enter, *argv], name=name, node=self.name, role=role, env=environment)

    def run(self, argv: Sequence[str], env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """Run a command there to its end."""
        return subprocess.run(
            [*self._enter, *argv], env=_environment(env), capture_output=True, text=True, timeout=60, check=False
        )

    def held(self) -> list[str]:
        """Files in its memory, by name; empty once the machine is gone."""
        memory = Path(f"/proc/{self._holder.pid}/root{MEMORY_DIR}")
        return sorted(path.name for path in memory.rglob("*") if path.is_file()) if memory.exists() else []

    def pids(self) -> list[int]:
        return self._keeper.pids(node=self.name)

    def kill(self, *, role: str) -> list[int]:
        """SIGKILL the processes of one role."""
        return self._keeper.kill(node=self.name, role=role)

    def pull(self) -> None:
        """The loss of the machine: its link first, then every process and with them its memory."""
        self.run(["ip", "link", "set", "eth0", "down"])
        self._keeper.kill(node=self.name)


class Network:
    """A switch with machines at it; the machine that tests run on is plugged in as ``.254``."""

    def __init__(self, keeper: ProcessKeeper) -> None:
        self.keeper = keeper
        self._subnet = f"10.{100 + secrets.randbelow(100)}.{secrets.randbelow(256)}"
        self._outside = f"bs{keeper.cluster_id}"
        self._switch = self._boot(SWITCH, "1m")
        self._ip(self._switch, "link", "add", "br0", "type", "bridge")
        self._ip(self._switch, "link", "set", "br0", "up")
        self._plug(self._outside, os.getpid(), "outside")
        for command in (
            ["addr", "add", f"{self._subnet}.254/24", "dev", self._outside],
            ["link", "set", self._outside, "up"],
        ):
            subprocess.run(["ip", *command], check=True)

    def add(self, name: str, number: int, *, memory: str = "256m") -> Machine:
        """A machine with an empty memory at address ``number`` of the network."""
        holder = self._boot(name, memory)
        self._plug("eth0", holder.pid, f"port{number}")
        address = f"{self._subnet}.{number}"
        self._ip(holder, "addr", "add", f"{address}/24", "dev", "eth0")
        self._ip(holder, "link", "set", "eth0", "up")
        return Machine(name, address, holder, self.keeper)

    def _boot(self, name: str, memory: str) -> subprocess.Popen[bytes]:
        boot = _BOOT.format(memory=MEMORY_DIR, size=memory)
        holder = self.keeper.spawn(["unshare", "-mn", "sh", "-c", boot], name=f"{name}-boot", node=name, role="machine")
        started = Path(f"/proc/{holder.pid}/cmdline")
        wait_until(
            lambda: started.read_bytes().startswith(b"sleep"),
            deadline_s=20, why=f"machine {name} to be up", evidence=self.keeper.logs,
        )  # fmt: skip
        return holder

    def _plug(self, interface: str, pid: int, port: str) -> None:
        """Connect namespace ``pid`` with the switch."""
        self._ip(self._switch, "link", "add", port, "type", "veth", "peer", "name", interface, "netns", str(pid))
        self._ip(self._switch, "link", "set", port, "master", "br0", "up")

    @staticmethod
    def _ip(holder: subprocess.Popen[bytes], *arguments: str) -> None:
        subprocess.run(["nsenter", f"--net=/proc/{holder.pid}/ns/net", "--", "ip", *arguments], check=True)


@contextmanager
def network(directory: Path) -> Iterator[Network]:
    """A network until the block ends; then every process on it is dead, also when the test is killed."""
    if reason := why_not():
        pytest.skip(reason)
    keeper = ProcessKeeper(secrets.token_hex(4), directory / "logs")
    scratch = directory / "scratch"
    with guarded(keeper.cluster_id, scratch):
        try:
            yield Network(keeper)
        finally:
            signal_processes(keeper.pids(), 9)
            keeper.kill()
            assert keeper.pids() == []
