"""SIGHUP: what may change while a daemon runs is taken over, the rest waits for a restart, nonsense changes nothing."""

from __future__ import annotations

import contextlib
import signal
from pathlib import Path

import psutil

from backstay.testing.wait import wait_until
from tests.kit.daemon_process import running_daemon
from tests.kit.notify_socket import NotifySocket


def command_of_coder(pid: int) -> list[str]:
    for child in psutil.Process(pid).children():
        with contextlib.suppress(psutil.Error):
            if "backstayd.coder" in child.cmdline():
                return child.cmdline()
    return []


def test_a_node_takes_over_quota_and_log_and_says_what_needs_a_restart(tmpfs_dir: Path, tmp_path: Path) -> None:
    config = tmp_path / "backstayd.toml"
    config.write_text('[node]\nquota_bytes = "64MiB"\n')
    paths = ("--memory-dir", str(tmpfs_dir / "memory"), "--socket", str(tmpfs_dir / "sock"))
    with (
        NotifySocket() as manager,
        running_daemon(
            "node", "--config", str(config), *paths, directory=tmp_path, env={"NOTIFY_SOCKET": manager.name}
        ) as daemon,
    ):
        assert daemon.status()["memory"]["quota_bytes"] == 64 << 20
        config.write_text('[node]\nquota_bytes = "32MiB"\nlog_level = "debug"\ncoders = 2\n')
        daemon.process.send_signal(signal.SIGHUP)
        taken = daemon.wait_for_line("reloaded", left="coders")["taken"]
        assert set(taken.split(", ")) == {"quota_bytes = 33554432", "log_level = 'debug'"}
        memory = daemon.status()["memory"]
        assert (memory["quota_bytes"], memory["capacity_bytes"]) == (32 << 20, 32 << 20)
        daemon.wait_for_line("http_request", path="/status.json")
        for coder in psutil.Process(daemon.process.pid).children():
            coder.kill()
        daemon.wait_for_line("coder_ended")
        wait_until(
            lambda: "debug" in command_of_coder(daemon.process.pid), deadline_s=30, why="a coder that logs likewise"
        )
        pid = daemon.process.pid
        asked = manager.wait_for(pid, "RELOADING", "1")
        assert asked.fields["MONOTONIC_USEC"].isdecimal()
        manager.wait_for(pid, "READY", "1", after=manager.of(pid).index(asked))

        config.write_text('[node]\nquota_bytes = "16MiB"\nlog_levle = "info"\n')
        daemon.process.send_signal(signal.SIGHUP)
        why = daemon.wait_for_line("not_reloaded")["why"]
        assert "[node] log_levle" in why
        assert "log_level" in why
        assert daemon.status()["memory"]["quota_bytes"] == 32 << 20


def test_a_coordinator_takes_over_policies_and_waits_with_what_the_geometry_rests_on(tmp_path: Path) -> None:
    config = tmp_path / "backstayd.toml"
    config.write_text("[coordinator]\n")
    with running_daemon("coordinator", "--config", str(config), directory=tmp_path) as daemon:
        daemon.wait_for_line("coordinator_listens")
        config.write_text("[coordinator]\nkeep = 2\nparity = 3\npersist_every_steps = 50\n")
        daemon.process.send_signal(signal.SIGHUP)
        taken = daemon.wait_for_line("reloaded", left="parity")["taken"]
        assert set(taken.split(", ")) == {"keep = 2", "persist_every_steps = 50"}
        daemon.process.send_signal(signal.SIGHUP)
        daemon.wait_for_line("nothing_to_reload", left="parity")
        assert daemon.process.poll() is None
