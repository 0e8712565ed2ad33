"""Mistakes of operators: each ends in one line that says what, which and what next, with the exit code of its class.

Real daemons, real ports, real limits. What does not end a daemon (a coordinator that is away, a name that is taken) is said in
its log instead.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from backstay.errors import ConfigError
from backstay.testing.wait import wait_until
from backstayd.security.credentials import TlsFiles
from tests.kit.certificates import TestAuthority, node_uri
from tests.kit.daemon_process import RunningDaemon, finished_daemon, running_daemon
from tests.kit.wording import says

CONFIG = ConfigError.exit_code
CGROUP = Path("/sys/fs/cgroup/memory")


def assert_one_line(printed: str, *facts: object) -> None:
    """One line of the program, with every fact in it."""
    assert re.fullmatch(r"backstayd: .*\n", printed), printed
    assert [fact for fact in facts if str(fact) not in printed] == [], printed


def paths(directory: Path) -> tuple[str, ...]:
    return ("--memory-dir", str(directory / "memory"), "--socket", str(directory / "sock"))


def refuse(role: str, *arguments: str, facts: tuple[object, ...], command: tuple[str, ...] = ()) -> None:
    """The daemon ends with one line that has all facts, and the exit code of a mistake in configuration."""
    done = finished_daemon(role, *arguments, command=command)
    assert done.returncode == CONFIG, done.stderr
    assert_one_line(done.stderr, *facts)


@contextlib.contextmanager
def taken_port() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        yield f"127.0.0.1:{taken.getsockname()[1]}"


def test_a_port_that_is_taken_is_named_with_the_flag_that_helps(tmpfs_dir: Path) -> None:
    with taken_port() as address:
        for flag in ("--listen", "--http"):
            refuse("coordinator", flag, address, facts=(address, f"another with {flag}"))
        for flag in ("--bulk", "--http"):
            refuse("node", *paths(tmpfs_dir), flag, address, facts=(address, f"another with {flag}"))


def test_an_election_that_cannot_be_held_is_refused_with_what_is_missing(tmp_path: Path) -> None:
    lease = ("--election", "kubernetes://backstay/coordinator")
    refuse("coordinator", "--listen", "0.0.0.0:0", *lease, facts=("0.0.0.0:", "--advertise HOST:PORT"))
    nowhere = ("env", f"KUBECONFIG={tmp_path}/none")
    refuse("coordinator", *lease, facts=("Kubernetes", "KUBECONFIG"), command=nowhere)
    etcd = f"etcd://127.0.0.1:1/x?ca={tmp_path}/none"
    refuse("coordinator", "--election", etcd, facts=(f"{tmp_path}/none", "ETCDCTL_CACERT"))


def test_a_quota_that_the_tmpfs_cannot_hold_is_refused_before_anything_is_taken(tmpfs_dir: Path) -> None:
    state = os.statvfs(tmpfs_dir)
    holds = state.f_blocks * state.f_frsize
    facts = (f"quota_bytes = {64 << 40}", tmpfs_dir / "memory", holds, "--quota")
    refuse("node", *paths(tmpfs_dir), "--quota", "64TiB", facts=facts)


def test_a_certificate_that_no_peer_would_take_is_refused_at_the_start(tmpfs_dir: Path, tmp_path: Path) -> None:
    ours, other = TestAuthority(tmp_path / "ca"), TestAuthority(tmp_path / "other", name="other CA")

    def start(files: TlsFiles, role: str, *facts: object) -> None:
        tls = ("--tls-cert", str(files.cert), "--tls-key", str(files.key), "--tls-ca", str(files.ca))
        more = ("--name", "n1", *paths(tmpfs_dir)) if role == "node" else ()
        refuse(role, *more, "--insecure", "false", *tls, facts=facts)

    files = ours.make(["spiffe://backstay/backstay/operator"])
    start(files, "node", files.cert, "spiffe://backstay/backstay/operator", "operator,")
    files = ours.make([node_uri("n2")])
    start(files, "node", files.cert, node_uri("n2"), "'n2'", "'n1'", "--name")
    start(files, "coordinator", files.cert, node_uri("n2"), "node,")
    files = ours.make([node_uri("n1")])
    files.ca.write_bytes(other.pem)
    start(files, "node", files.ca, files.cert)
    files = ours.make([node_uri("n1")])
    files.key.unlink()
    start(files, "node", files.key, os.strerror(errno.ENOENT))


@pytest.fixture
def small_cgroup() -> Iterator[Path]:
    """A memory cgroup of 256 MiB."""
    directory = CGROUP / f"backstay-test-{os.getpid()}"
    try:
        directory.mkdir()
        (directory / "memory.limit_in_bytes").write_text(str(256 << 20))
    except OSError as error:
        pytest.skip(f"no memory cgroup can be made here: {error}")
    yield directory
    directory.rmdir()


def test_a_quota_over_the_memory_limit_is_refused_before_the_kernel_would_kill(
    tmpfs_dir: Path, small_cgroup: Path
) -> None:
    join = f'echo $$ > {small_cgroup}/cgroup.procs && exec "$@"'
    facts = (f"quota_bytes = {1 << 30}", small_cgroup, 256 << 20, "--quota")
    refuse("node", *paths(tmpfs_dir), "--quota", "1GiB", facts=facts, command=("sh", "-c", join, "sh"))


def test_a_memory_dir_on_a_disk_is_refused_with_the_mount_that_helps(tmp_path: Path) -> None:
    if Path("/dev/shm").stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("temporary files of this machine lie on the tmpfs")
    mount = f"mount -t tmpfs -o size=...,mode=0700 backstay {tmp_path / 'memory'}"
    refuse("node", *paths(tmp_path), facts=(mount,))


def test_a_place_that_is_another_daemons_is_left_to_it(tmpfs_dir: Path, tmp_path: Path) -> None:
    memory, sock = tmpfs_dir / "memory", tmpfs_dir / "sock"
    with running_daemon("node", *paths(tmpfs_dir), directory=tmp_path) as daemon:
        daemon.wait_for_line("node_serves")
        other = str(tmpfs_dir / "other")
        refuse("node", "--memory-dir", str(memory), "--socket", other, facts=(memory, "another running daemon"))
        refuse("node", "--memory-dir", other, "--socket", str(sock), facts=("another daemon", sock, "--socket"))
        assert daemon.status()["role"] == "node", "the first goes on"


def test_a_socket_path_with_something_else_in_it_is_not_deleted(tmpfs_dir: Path) -> None:
    sock = tmpfs_dir / "sock"
    sock.write_text("precious")
    refuse("node", *paths(tmpfs_dir), facts=(sock, "not a socket", "--socket"))
    assert sock.read_text() == "precious"


@pytest.mark.skipif(os.geteuid() != 0, reason="being another user needs root")
def test_a_directory_of_another_user_is_named_with_the_user_that_needs_it(tmpfs_dir: Path, tmp_path: Path) -> None:
    """The daemon runs as root without the rights that root has over the files of others."""
    stranger = 61503
    for name in ("memory", "sockets"):
        (tmpfs_dir / name).mkdir()
        os.chown(tmpfs_dir / name, stranger, stranger)
    command = ("setpriv", "--bounding-set=-all", "--inh-caps=-all")
    memory, sock = tmpfs_dir / "memory", tmpfs_dir / "sockets" / "sock"
    (tmpfs_dir / "memory").chmod(0o700)
    (tmpfs_dir / "sockets").chmod(0o500)
    denied = os.strerror(errno.EACCES)
    for place, facts in (
        (memory, (memory, stranger, "user 0")),
        (memory / "deeper", (memory / "deeper", "user 0", denied, "--memory-dir")),
        (tmpfs_dir / "own", (sock, "user 0", denied, "--socket")),
    ):
        refuse("node", "--memory-dir", str(place), "--socket", str(sock), facts=facts, command=command)


def test_a_node_whose_coordinator_is_away_serves_its_trainers_and_says_so(tmpfs_dir: Path, tmp_path: Path) -> None:
    with running_daemon("node", *paths(tmpfs_dir), "--coordinator", "127.0.0.1:9", directory=tmp_path) as daemon:
        why = daemon.wait_for_line("no_coordinator")["why"]
        assert "127.0.0.1:9" in why
        assert os.strerror(errno.ECONNREFUSED) in why
        with socket.socket(socket.AF_UNIX) as trainer:
            trainer.connect(str(tmpfs_dir / "sock"))
        assert daemon.process.poll() is None


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[RunningDaemon]:
    with running_daemon("coordinator", directory=tmp_path) as daemon:
        yield daemon


def test_the_second_machine_of_a_name_is_refused_by_name_and_the_first_goes_on(
    tmpfs_dir: Path, tmp_path: Path, coordinator: RunningDaemon
) -> None:
    address = coordinator.wait_for_line("coordinator_listens")["address"]
    machines = {name: (tmpfs_dir / name, tmp_path / name) for name in ("first", "second")}
    for places in machines.values():
        for place in places:
            place.mkdir()
    arguments = {
        name: (*paths(memory), "--name", "n1", "--coordinator", address) for name, (memory, _) in machines.items()
    }
    with running_daemon("node", *arguments["first"], directory=machines["first"][1]) as first:
        first.wait_for_line("coordinator_connected")
        with running_daemon("node", *arguments["second"], directory=machines["second"][1]) as second:
            second.wait_for_line("name_is_taken", name="n1")
            assert not says("coordinator_connected", second.log.read_text())
            assert not says("coordinator_lost", first.log.read_text())
            first.process.terminate()
            second.wait_for_line("coordinator_connected")  # the name is free
    wait_until(
        lambda: [node["name"] for node in coordinator.status()["nodes"]] == ["n1"],
        deadline_s=10,
        why="one node of that name",
    )
    assert "Traceback" not in coordinator.log.read_text(), sys.version
