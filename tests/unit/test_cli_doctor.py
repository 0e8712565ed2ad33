"""The checks of `backstay doctor`, each against a machine made of files, numbers and sockets."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from pathlib import Path

import pytest

from backstay import __version__
from backstay.protocol import framing, messages
from backstayd import cli
from backstayd.cli.doctor import daemon_checks, machine_checks, software_checks
from backstayd.cli.doctor.findings import Level

MOUNTS = """\
22 1 8:1 / / rw,relatime - ext4 /dev/sda1 rw
30 22 0:25 / /dev/shm rw,nosuid - tmpfs tmpfs rw
31 22 0:26 / /mnt/with\\040blank rw - tmpfs backstay rw,size=1g
32 31 0:27 / /mnt/with\\040blank/inner rw - xfs /dev/sdb rw
"""


@pytest.mark.parametrize(
    ("path", "point", "kind"),
    [
        ("/var/lib", "/", "ext4"),
        ("/dev/shm/x", "/dev/shm", "tmpfs"),
        ("/dev/shmother", "/", "ext4"),
        ("/mnt/with blank/a", "/mnt/with blank", "tmpfs"),
        ("/mnt/with blank/inner/a", "/mnt/with blank/inner", "xfs"),
    ],
)
def test_the_mount_of_a_path_is_the_deepest_one_that_holds_it(path: str, point: str, kind: str) -> None:
    assert machine_checks.find_mount(Path(path), MOUNTS) == machine_checks.Mount(point=Path(point), kind=kind)


def test_a_memory_directory_on_a_disk_fails(tmp_path: Path) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text("22 1 8:1 / / rw - ext4 /dev/sda1 rw\n", encoding="utf-8")
    finding = machine_checks.check_memory_dir(tmp_path / "memory", pid=None, mountinfo=mounts)
    assert finding.level is Level.FAIL
    assert "is on ext4" in finding.detail


def test_a_memory_directory_on_dev_shm_is_warned_about(tmpfs_dir: Path) -> None:
    finding = machine_checks.check_memory_dir(tmpfs_dir, pid=None)
    assert finding.level is Level.WARN
    assert "/dev/shm is shared" in finding.detail


def test_the_lowest_limit_of_cgroup_v2_and_its_ancestors_counts(tmp_path: Path) -> None:
    root, proc = tmp_path / "cgroup", tmp_path / "proc"
    (proc / "7").mkdir(parents=True)
    (proc / "7" / "cgroup").write_text("0::/system/backstayd\n", encoding="utf-8")
    (root / "system" / "backstayd").mkdir(parents=True)
    (root / "system" / "backstayd" / "memory.max").write_text("max\n", encoding="utf-8")
    (root / "system" / "memory.max").write_text(f"{8 << 30}\n", encoding="utf-8")
    assert machine_checks.cgroup_limit(7, root=root, proc=proc) == (8 << 30, root / "system" / "memory.max")


def test_the_limit_of_cgroup_v1_is_read_and_its_huge_number_means_none(tmp_path: Path) -> None:
    root, proc = tmp_path / "cgroup", tmp_path / "proc"
    (proc / "self").mkdir(parents=True)
    (proc / "self" / "cgroup").write_text("5:cpu:/a\n4:memory:/a\n0::/\n", encoding="utf-8")
    (root / "memory" / "a").mkdir(parents=True)
    limit = root / "memory" / "a" / "memory.limit_in_bytes"
    limit.write_text("9223372036854771712\n", encoding="utf-8")
    assert machine_checks.cgroup_limit(None, root=root, proc=proc) is None
    limit.write_text("1048576\n", encoding="utf-8")
    assert machine_checks.cgroup_limit(None, root=root, proc=proc) == (1048576, limit)


def test_a_port_that_another_program_uses_fails_and_a_free_one_does_not() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        taken = machine_checks.check_address(address, daemon_pid=None)
        ours = machine_checks.check_address(address, daemon_pid=os.getpid())
    assert (taken.level, ours.level) == (Level.FAIL, Level.OK)
    assert f"pid {os.getpid()}" in taken.detail
    assert machine_checks.check_address("127.0.0.1:0", daemon_pid=None).level is Level.OK


def test_an_address_of_another_machine_cannot_be_bound() -> None:
    assert machine_checks.check_address("192.0.2.1:7071", daemon_pid=None).level is Level.FAIL


def test_the_codec_of_this_machine_rebuilds_what_was_lost() -> None:
    assert software_checks.check_codec().level is Level.OK


def test_every_package_needed_here_is_found_with_its_version() -> None:
    findings = software_checks.check_versions()
    assert findings[0].subject == "backstay"
    assert findings[0].detail.startswith(__version__)
    assert all(finding.level is Level.OK for finding in findings), findings


def test_nodes_of_another_version_are_named() -> None:
    finding = software_checks.check_versions_agree({"a": __version__, "b": "0.0.1"})
    assert finding.level is Level.WARN
    assert "0.0.1" in finding.detail


@pytest.mark.parametrize(
    ("timeout_s", "level"), [(5.0, Level.FAIL), (60.0, Level.WARN), (600.0, Level.OK), (1800.0, Level.OK)]
)
def test_the_collective_timeout_is_held_against_lease_and_restore_deadline(timeout_s: float, level: Level) -> None:
    finding = daemon_checks.check_collective_timeout(timeout_s, lease_s=3, restore_deadline_s=600, source="flag")
    assert finding.level is level


@pytest.mark.parametrize(("offset_s", "level"), [(0.0, Level.OK), (2.0, Level.OK), (-60.0, Level.WARN)])
def test_a_clock_is_wrong_when_it_is_off_by_more_than_a_lease(offset_s: float, level: Level) -> None:
    now = time.time()
    finding = daemon_checks.check_clock({"time_unix_s": now + offset_s}, asked_unix_s=now, lease_s=3)
    assert finding.level is level


def _serve_once(listener: socket.socket) -> None:
    connection, _ = listener.accept()
    with connection:
        message, message_id, _ = framing.receive_frame(connection)
        assert message == messages.Status()
        document = {"node": {"name": "node-01", "version": "0.1.0"}}
        framing.send_frame(connection, messages.StatusBody(document=document), message_id=message_id)


def test_a_daemon_that_answers_is_named_with_its_pid(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)
        server = threading.Thread(target=_serve_once, args=(listener,))
        server.start()
        answer = daemon_checks.ask_daemon(path, timeout_s=5)
        server.join(5)
    assert answer.pid == os.getpid()
    assert answer.finding.level is Level.OK
    assert "node node-01" in answer.finding.detail


def test_a_socket_without_a_daemon_is_told_from_one_that_hangs_and_one_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "s"
    absent = daemon_checks.ask_daemon(path, timeout_s=0.2)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)
        silent = daemon_checks.ask_daemon(path, timeout_s=0.2)
    dead = daemon_checks.ask_daemon(path, timeout_s=0.2)
    assert "does not exist" in absent.finding.detail
    assert "no answer within" in silent.finding.detail
    assert "nobody listens" in dead.finding.detail
    assert {answer.finding.level for answer in (absent, silent, dead)} == {Level.FAIL}


def test_doctor_exits_one_when_something_fails_and_its_json_says_what(
    tmpfs_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["doctor", "--json", "--memory-dir", str(tmpfs_dir), "--socket", str(tmpfs_dir / "none")]
    argv += ["--coordinator", "127.0.0.1:1", "--timeout-s", "1", "--collective-timeout-s", "1800"]
    assert cli.main(argv) == 1
    report = json.loads(capsys.readouterr().out)
    levels = {finding["subject"]: finding["level"] for finding in report["findings"]}
    assert report["is_healthy"] is False
    assert levels["daemon socket"] == levels["coordinator"] == "FAIL"
    assert levels["codec"] == levels["collective timeout"] == "OK"
