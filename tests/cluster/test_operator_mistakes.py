"""Mistakes of operators: each ends in one line that says what, which and what next, with the exit code of its class.

Real daemons, real ports, real limits. What does not end a daemon (a coordinator that is away, a name that is taken) is said in
its log instead.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from backstay.errors import ConfigError, UsageError
from backstay.testing.daemons import fetch_json
from backstay.testing.wait import wait_until
from backstayd import app
from backstayd.security.credentials import TlsFiles
from tests.kit.certificates import TestAuthority, node_uri
from tests.kit.daemon_process import RunningDaemon, finished_daemon, running_daemon

CONFIG = ConfigError.exit_code
CGROUP = Path("/sys/fs/cgroup/memory")


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ('[node]\nnmae = "n1"\n', r"\[node\] nmae is not a setting; the nearest one is name"),
        ("[node]\nparity = 2\n", r"\[node\] parity is a setting of \[coordinator\]: write it there"),
        ('coders = 2\n[node]\nname = "n1"\n', r"coders is a setting of \[node\]: write it there"),
        ("[nodes]\ncoders = 2\n", r"nodes is not a setting; the nearest one is node"),
        ("[node]\ncoders = \n", r"is not TOML: Invalid value \(at line 2, column 10\)"),
        ("[node]\ncoders = 0\n", r"\[node\] coders = 0 is not a number from 1 to 64"),
        ('[node]\nquota_bytes = "8 GB"\ncoordinator = "here"\n', r"coordinator = 'here' is not HOST:PORT"),
        ("node = 3\n", r"node is not a table; write \[node\]"),
        ('[node]\nbulk = "0.0.0.0:7071"\n', r"is a wildcard: peers are told this address, so name one they can reach"),
    ],
)
def test_a_bad_file_is_refused_by_place_and_name(
    text: str, pattern: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "backstayd.toml"
    config.write_text(text)
    assert app.main(["node", "--config", str(config), "--insecure", "--check-config"]) == CONFIG
    said = capsys.readouterr().err
    assert re.fullmatch(rf"backstayd: {re.escape(str(config))}.* ?{pattern}.*\n", said), said


@pytest.mark.parametrize(
    ("argv", "code", "pattern"),
    [
        (["node", "--coder", "2"], UsageError.exit_code, r"unrecognized arguments: --coder 2 \(see backstayd --help\)"),
        (["nod"], UsageError.exit_code, r"invalid choice: 'nod' \(choose from 'node', 'coordinator'\)"),
        (
            ["node", "--socket", "/run/" + "x" * 110],
            CONFIG,
            r"is longer than the 107 bytes that a Unix socket's path may",
        ),
        (["node", "--memory-dir", "memory"], CONFIG, r"--memory-dir = 'memory' is not an absolute path"),
        (["coordinator", "--parity", "5"], CONFIG, r"--parity = '5' is neither 'auto' nor a number from 0 to 4"),
        (
            ["coordinator", "--election", "zookeeper://a:1/x"],
            CONFIG,
            r"is neither empty nor etcd://HOST:PORT.* nor kub",
        ),
        (["coordinator", "--advertise", "0.0.0.0:7070"], CONFIG, r"is a wildcard: peers are told this address, so"),
        (["coordinator", "--persist-url", "bucket"], CONFIG, r"is neither empty nor a URL such as file:///mnt/ckpt"),
    ],
)
def test_a_bad_command_line_is_refused(
    argv: list[str], code: int, pattern: str, capsys: pytest.CaptureFixture[str]
) -> None:
    insecure = ["--insecure"] if argv[0] != "nod" else []
    assert app.main([*argv, *insecure]) == code
    said = capsys.readouterr().err
    assert re.fullmatch(rf"backstayd: .*{pattern}.*\n", said), said


def paths(directory: Path) -> tuple[str, ...]:
    return ("--memory-dir", str(directory / "memory"), "--socket", str(directory / "sock"))


def refuse(role: str, *arguments: str, says: str, command: tuple[str, ...] = ()) -> None:
    """The daemon ends with one line that matches and the exit code of a mistake in configuration."""
    done = finished_daemon(role, *arguments, command=command)
    assert done.returncode == CONFIG, done.stderr
    assert re.fullmatch(rf"backstayd: {says}\n", done.stderr), done.stderr


@contextlib.contextmanager
def taken_port() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        yield f"127.0.0.1:{taken.getsockname()[1]}"


def test_a_port_that_is_taken_is_named_with_the_flag_that_helps(tmpfs_dir: Path) -> None:
    with taken_port() as address:
        used = "another process uses it"
        other = "or it is no address of this machine; choose another with --listen"
        refuse("coordinator", "--listen", address, says=rf"cannot listen on {address}: {used}, {other}")
        refuse(
            "coordinator", "--http", address, says=f"cannot serve HTTP on {address}: {used}; choose another with --http"
        )
        node = paths(tmpfs_dir)
        refuse(
            "node",
            *node,
            "--bulk",
            address,
            says=f"cannot serve peers on {address}: {used}; choose another with --bulk",
        )
        refuse(
            "node", *node, "--http", address, says=f"cannot serve HTTP on {address}: {used}; choose another with --http"
        )


def test_an_election_that_cannot_be_held_is_refused_with_what_is_missing(tmp_path: Path) -> None:
    lease = ("--election", "kubernetes://backstay/coordinator")
    told = r"others are told where this coordinator is, and 0\.0\.0\.0:\d+ is no such place; give --advertise HOST:PORT"
    refuse("coordinator", "--listen", "0.0.0.0:0", *lease, says=rf"with an election {told}.*")
    nowhere = ("env", f"KUBECONFIG={tmp_path}/none")
    access = "neither a service account in this pod nor a usable KUBECONFIG"
    refuse("coordinator", *lease, says=rf"no access to Kubernetes: {access}.*", command=nowhere)
    etcd = f"etcd://127.0.0.1:1/x?ca={tmp_path}/none"
    refuse("coordinator", "--election", etcd, says=rf"cannot read {tmp_path}/none, given as ca \(or ETCDCTL_CACERT\).*")


def test_a_quota_that_the_tmpfs_cannot_hold_is_refused_before_anything_is_taken(tmpfs_dir: Path) -> None:
    state = os.statvfs(tmpfs_dir)
    holds = state.f_blocks * state.f_frsize
    memory = tmpfs_dir / "memory"
    refuse(
        "node", *paths(tmpfs_dir), "--quota", "64TiB",
        says=rf"quota_bytes = {64 << 40} does not fit: tmpfs {memory} holds {holds} bytes; raise that limit or lower --quota",
    )  # fmt: skip


def test_a_certificate_that_no_peer_would_take_is_refused_at_the_start(tmpfs_dir: Path, tmp_path: Path) -> None:
    ours, other = TestAuthority(tmp_path / "ca"), TestAuthority(tmp_path / "other", name="other CA")

    def start(files: TlsFiles, role: str, says: str) -> None:
        tls = (
            "--insecure",
            "false",
            "--tls-cert",
            str(files.cert),
            "--tls-key",
            str(files.key),
            "--tls-ca",
            str(files.ca),
        )
        more = ("--name", "n1", *paths(tmpfs_dir)) if role == "node" else ()
        refuse(role, *more, *tls, says=says)

    files = ours.make(["spiffe://backstay/backstay/operator"])
    start(files, "node", f"{files.cert}: spiffe://backstay/backstay/operator may not .*: its role is operator, .*")
    files = ours.make([node_uri("n2")])
    start(files, "node", f"{files.cert}: {node_uri('n2')} may not .*: it is node 'n2', not 'n1'; .*--name.*")
    start(files, "coordinator", f"{files.cert}: {node_uri('n2')} may not .*: its role is node, .*")
    files = ours.make([node_uri("n1")])
    files.ca.write_bytes(other.pem)
    start(files, "node", f"{files.ca} does not vouch for {files.cert}: .*; peers would refuse it")
    files = ours.make([node_uri("n1")])
    files.key.unlink()
    start(files, "node", f"cannot read {files.key}: No such file or directory")


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
    refuse(
        "node", *paths(tmpfs_dir), "--quota", "1GiB", command=("sh", "-c", join, "sh"),
        says=rf"quota_bytes = {1 << 30} does not fit: cgroup limit {small_cgroup} holds {256 << 20} bytes; "
        "raise that limit or lower --quota",
    )  # fmt: skip


def test_a_memory_dir_on_a_disk_is_refused_with_the_mount_that_helps(tmp_path: Path) -> None:
    if Path("/dev/shm").stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("temporary files of this machine lie on the tmpfs")
    memory = tmp_path / "memory"
    mount = f"mount -t tmpfs -o size=...,mode=0700 backstay {memory}"
    refuse("node", *paths(tmp_path), says=rf"memory directory {memory} is not on a tmpfs: {mount}")


def test_a_place_that_is_another_daemons_is_left_to_it(tmpfs_dir: Path, tmp_path: Path) -> None:
    memory, sock = tmpfs_dir / "memory", tmpfs_dir / "sock"
    with running_daemon("node", *paths(tmpfs_dir), directory=tmp_path) as daemon:
        address = daemon.http
        refuse(
            "node", "--memory-dir", str(memory), "--socket", str(tmpfs_dir / "other"),
            says=f"memory directory {memory} belongs to another running daemon; one daemon per directory",
        )  # fmt: skip
        refuse(
            "node", "--memory-dir", str(tmpfs_dir / "other"), "--socket", str(sock),
            says=f"another daemon listens on {sock}; choose another --socket",
        )  # fmt: skip
        host, _, port = address.rpartition(":")
        assert fetch_json(host, int(port), "/status.json")["role"] == "node", "the first goes on"


def test_a_socket_path_with_something_else_in_it_is_not_deleted(tmpfs_dir: Path) -> None:
    sock = tmpfs_dir / "sock"
    sock.write_text("precious")
    refuse("node", *paths(tmpfs_dir), says=f"{sock} exists and is not a socket; remove it or choose another --socket")
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
    refuse(
        "node", "--memory-dir", str(memory), "--socket", str(sock), command=command,
        says=rf"memory directory {memory} belongs to user {stranger}, this daemon is user 0; .*",
    )  # fmt: skip
    refuse(
        "node", "--memory-dir", str(memory / "deeper"), "--socket", str(sock), command=command,
        says=rf"memory directory {memory}/deeper cannot be used by user 0: Permission denied; give it .* --memory-dir",
    )  # fmt: skip
    refuse(
        "node", "--memory-dir", str(tmpfs_dir / "own"), "--socket", str(sock), command=command,
        says=rf"cannot listen on the socket {sock} as user 0: Permission denied; choose another --socket or give .*",
    )  # fmt: skip


def test_a_node_whose_coordinator_is_away_serves_its_trainers_and_says_so(tmpfs_dir: Path, tmp_path: Path) -> None:
    with running_daemon("node", *paths(tmpfs_dir), "--coordinator", "127.0.0.1:9", directory=tmp_path) as daemon:
        daemon.wait_for_line(r"WARNING .*coordinator 127\.0\.0\.1:9.*Connection refused")
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
    address = coordinator.wait_for_line(r"listens at (\S+),").group(1)
    machines = {name: (tmpfs_dir / name, tmp_path / name) for name in ("first", "second")}
    for places in machines.values():
        for place in places:
            place.mkdir()
    arguments = {
        name: (*paths(memory), "--name", "n1", "--coordinator", address) for name, (memory, _) in machines.items()
    }
    with running_daemon("node", *arguments["first"], directory=machines["first"][1]) as first:
        first.wait_for_line("connected to the coordinator")
        with running_daemon("node", *arguments["second"], directory=machines["second"][1]) as second:
            second.wait_for_line(
                r"the node name 'n1' is taken: a daemon of that name \(incarnation \w+, peers at .*--name"
            )
            assert "connected to the coordinator" not in second.log.read_text()
            assert "lost the coordinator" not in first.log.read_text()
            first.process.terminate()
            second.wait_for_line("connected to the coordinator")  # the name is free
    host, _, port = coordinator.http.rpartition(":")
    wait_until(
        lambda: [node["name"] for node in fetch_json(host, int(port), "/status.json")["nodes"]] == ["n1"],
        deadline_s=10, why="one node of that name",
    )  # fmt: skip
    assert "Traceback" not in coordinator.log.read_text(), sys.version
