"""The daemons inside the sandbox of their systemd units, serving trainers of another user: hardening breaks nothing."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from backstay.testing.cluster import process_environment
from backstay.testing.ports import free_port
from backstay.testing.wait import wait_until
from tests.kit.daemon_process import RunningDaemon, running_daemon
from tests.kit.etcd import ETCD, running_etcd
from tests.kit.sandboxed import HEADER

ROOT = Path(__file__).parents[2]
UNITS = ROOT / "deploy" / "systemd"
DAEMON_ID, TRAINER_ID = 61501, 61502  # users that exist nowhere
SOCKET_GROUP_ID = 61510  # backstay-trainers
MANY_STEPS = 100_000  # ended by the test

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="making a sandbox needs root"),
    pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze: apt-get install systemd"),
    pytest.mark.skipif(not HEADER.exists(), reason=f"no {HEADER}: apt-get install linux-libc-dev"),
]


def sandbox(unit: str, socket_dir: Path, memory_dir: Path | None = None) -> tuple[str, ...]:
    """What a daemon is started through."""
    socket_dir.mkdir()
    os.chown(socket_dir, DAEMON_ID, DAEMON_ID)
    socket_dir.chmod(0o711)
    if memory_dir is not None:
        memory_dir.mkdir()
    places = {"socket_dir": str(socket_dir), "memory_dir": str(memory_dir or "")}
    return launcher({"unit": str(UNITS / unit), "uid": DAEMON_ID, "groups": [DAEMON_ID, SOCKET_GROUP_ID]} | places)


def launcher(options: dict[str, Any]) -> tuple[str, ...]:
    options |= {"keep": [str(ROOT), sys.prefix, sys.base_prefix]}
    script = str(ROOT / "tests" / "kit" / "sandboxed.py")
    return ("unshare", "--mount", sys.executable, script, json.dumps(options))


@pytest.fixture
def base(tmpfs_dir: Path) -> Path:
    tmpfs_dir.chmod(0o755)
    return tmpfs_dir


@pytest.fixture
def election(base: Path) -> Iterator[tuple[str, ...]]:
    """With an etcd over HTTPS, where there is one."""
    if ETCD is None:
        yield ()
        return
    directory = base / "etcd"
    directory.mkdir()
    with running_etcd(directory, is_tls=True) as etcd:
        for path in directory.glob("client.*"):
            path.chmod(0o644)
        yield ("--election", etcd.url("sandbox"))


@pytest.fixture
def coordinator(base: Path, election: tuple[str, ...]) -> Iterator[RunningDaemon]:
    command = sandbox("backstay-coordinator.service", base / "c")
    with running_daemon("coordinator", "--parity", "1", *election, directory=base, command=command) as daemon:
        yield daemon


@contextlib.contextmanager
def sandboxed_node(
    base: Path,
    name: str,
    coordinator: str,
    *,
    env: Mapping[str, str] | None = None,
    unit: str = "backstayd.service",
    socket_group: str = str(SOCKET_GROUP_ID),
) -> Iterator[RunningDaemon]:
    directory = base / name
    directory.mkdir()
    command = sandbox(unit, directory / "run", directory / "memory")
    arguments = ("--name", name, "--memory-dir", str(directory / "memory"), "--socket", str(directory / "run" / "sock"))
    arguments += ("--coordinator", coordinator, "--socket-group", socket_group)
    with running_daemon("node", *arguments, directory=directory, env=env, command=command) as daemon:
        yield daemon


def start_trainer(base: Path, rank: int, socket: Path, port: int) -> subprocess.Popen[bytes]:
    """A rank as another user, who is a member of the socket's group and of none of the daemon's."""
    log = base / f"rank-{rank}.jsonl"
    log.touch()
    os.chown(log, TRAINER_ID, TRAINER_ID)
    options = {"rank": rank, "world_size": 2, "port": port, "run_id": "sandbox", "log": str(log), "is_attached": True}
    options |= {"last_step": MANY_STEPS, "stop": str(base / "stop"), "pause_s": 0.05}
    user = launcher({"unit": "", "uid": TRAINER_ID, "groups": [TRAINER_ID, SOCKET_GROUP_ID]})
    argv = [*user, sys.executable, str(ROOT / "tests" / "kit" / "trainer_script.py"), json.dumps(options)]
    environment = process_environment() | {"BACKSTAY_SOCKET": str(socket), "HOME": str(base)}
    environment.pop("TORCHINDUCTOR_CACHE_DIR", None)  # torch, imported by an earlier test, names a directory of root's
    return subprocess.Popen(argv, env=environment)


def test_two_sandboxed_nodes_protect_a_run_of_another_user(base: Path, coordinator: RunningDaemon) -> None:
    address = coordinator.wait_for_line("coordinator_listens")["address"]
    address = address.replace("127.0.0.1", "localhost")  # names are resolved in the sandbox, too
    with sandboxed_node(base, "n0", address) as first, sandboxed_node(base, "n1", address) as second:
        wait_until(
            lambda: len(coordinator.status()["nodes"]) == 2,
            deadline_s=60,
            why="both nodes to report",
            evidence=lambda: first.log.read_text() + coordinator.log.read_text(),
        )
        port = free_port()
        trainers = [start_trainer(base, rank, base / f"n{rank}" / "run" / "sock", port) for rank in (0, 1)]
        try:
            wait_until(
                lambda: is_protected(coordinator) or any(trainer.poll() is not None for trainer in trainers),
                deadline_s=90, why="protection", evidence=first.log.read_text,
            )  # fmt: skip
            assert [trainer.returncode for trainer in trainers] == [None, None], "a trainer ended early"
            for daemon, trainer in zip((first, second), trainers, strict=True):
                (session,) = daemon.status()["runs"][0]["sessions"]
                assert session["pid"] == trainer.pid
        finally:
            (base / "stop").touch()
            for trainer in trainers:
                trainer.wait(60)
        assert [trainer.returncode for trainer in trainers] == [0, 0]
        for daemon in (first, second):
            check_sandbox(daemon)
            assert "Traceback" not in daemon.log.read_text()
            assert " ERROR " not in daemon.log.read_text()


def is_protected(coordinator: RunningDaemon) -> bool:
    return any(run["protected_step"] > 0 for run in coordinator.status()["runs"])


def check_sandbox(daemon: RunningDaemon) -> None:
    """The sandbox is one: the daemon has no right in it that the unit takes away."""
    lines = Path(f"/proc/{daemon.process.pid}/status").read_text().splitlines()
    fields = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
    assert fields["Uid"] == [str(DAEMON_ID)] * 4
    assert (fields["CapBnd"], fields["CapEff"]) == (["0000000000000000"], ["0000000000000000"])
    assert (fields["NoNewPrivs"], fields["Seccomp"]) == (["1"], ["2"])
    limits = Path(f"/proc/{daemon.process.pid}/limits").read_text()
    may_lock = re.search(r"Max\s+locked\s+memory\s+unlimited", limits) is not None
    assert (int(fields["VmLck"][0]) > 0) == may_lock, "the daemon locks itself in memory where it may"


def test_a_unit_of_before_which_knows_no_group_for_the_socket_still_starts_its_daemon(base: Path) -> None:
    lines = (UNITS / "backstayd.service").read_text().splitlines(keepends=True)
    before = base / "before.service"
    before.write_text("".join(line for line in lines if "@chown" not in line))
    with sandboxed_node(base, "n0", "127.0.0.1:9", unit=str(before), socket_group="") as node:
        node.wait_for_line("node_serves")
        assert (base / "n0" / "run" / "sock").stat().st_gid == DAEMON_ID
