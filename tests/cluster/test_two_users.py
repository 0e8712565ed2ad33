"""Two users on machines installed by the docs: nothing of the one can be read, listed, evicted or starved by the other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from backstay.testing.cluster import process_environment
from backstay.testing.ports import free_port
from backstay.testing.wait import wait_until
from tests.cluster.test_sandbox import (
    DAEMON_ID,
    SOCKET_GROUP_ID,
    TRAINER_ID,
    launcher,
    pytestmark,
    sandboxed_node,
    start_trainer,
)
from tests.kit.daemon_process import RunningDaemon, running_daemon
from tests.kit.neighbour import SLOT_BYTES

__all__ = ["pytestmark"]  # what it needs, a sandbox needs

NEIGHBOUR_ID = 61503
USER_QUOTA_BYTES = 64 << 20
RUN = "default/sandbox"


def start_neighbour(base: Path, options: dict[str, object]) -> subprocess.Popen[bytes]:
    """As the docs make a trainer: a user of its own, in the group of the socket."""
    user = launcher({"unit": "", "uid": NEIGHBOUR_ID, "groups": [NEIGHBOUR_ID, SOCKET_GROUP_ID]})
    environment = process_environment() | {"HOME": str(base), "PYTHONPATH": str(Path(__file__).parents[2])}
    argv = [*user, sys.executable, "-m", "tests.kit.neighbour", json.dumps(options)]
    return subprocess.Popen(argv, env=environment)


def protected_step(coordinator: RunningDaemon) -> int:
    return max((run["protected_step"] for run in coordinator.status()["runs"] if run["run"] == RUN), default=0)


def test_a_user_can_neither_read_nor_list_nor_evict_nor_starve_what_is_anothers(tmpfs_dir: Path) -> None:
    base = tmpfs_dir
    base.chmod(0o755)
    keys = base / "tls"
    keys.mkdir(mode=0o755)
    for name, mode in (("tls.key", 0o640), ("backstayd.toml", 0o640)):  # owner root, group of the daemon
        (keys / name).write_text("secret")
        os.chown(keys / name, 0, DAEMON_ID)
        (keys / name).chmod(mode)
    report = base / "neighbour.json"
    report.touch()
    os.chown(report, NEIGHBOUR_ID, NEIGHBOUR_ID)
    quota = {"BACKSTAYD_NODE_USER_QUOTA_BYTES": str(USER_QUOTA_BYTES)}
    with running_daemon("coordinator", "--parity", "1", directory=base) as coordinator:
        address = coordinator.wait_for_line("coordinator_listens")["address"]
        with (
            sandboxed_node(base, "n0", address, env=quota) as first,
            sandboxed_node(base, "n1", address, env=quota) as second,
        ):
            wait_until(lambda: len(coordinator.status()["nodes"]) == 2, deadline_s=60, why="both nodes to report")
            port = free_port()
            trainers = [start_trainer(base, rank, base / f"n{rank}" / "run" / "sock", port) for rank in (0, 1)]
            neighbour = None
            try:
                wait_until(
                    lambda: protected_step(coordinator) > 2, deadline_s=90, why="the owner's run to be protected"
                )
                options = {
                    "socket": str(base / "n0" / "run" / "sock"),
                    "run": RUN,
                    "memory_dir": f"/proc/{first.process.pid}/root{base / 'n0' / 'memory'}",
                    "keys": [str(path) for path in sorted(keys.iterdir())],
                    "daemon_pid": first.process.pid,
                    "trainer_pid": trainers[0].pid,
                    "report": str(report),
                }
                neighbour = start_neighbour(base, options)
                wait_until(
                    lambda: report.read_text() or neighbour.poll() is not None,
                    deadline_s=120,
                    why="the neighbour's report",
                )
                found = json.loads(report.read_text())
                before = protected_step(coordinator)
                wait_until(
                    lambda: protected_step(coordinator) > before + 3, deadline_s=60,
                    why="the owner's run to go on beside all that", evidence=first.log.read_text,
                )  # fmt: skip
                assert [trainer.poll() for trainer in trainers] == [None, None]
            finally:
                (base / "stop").touch()
                for process in [*trainers, *([neighbour] if neighbour is not None else [])]:
                    process.terminate() if process is neighbour else None
                    process.wait(60)
            logs = [daemon.log.read_text() for daemon in (first, second, coordinator)]
    assert set(found["stolen"].values()) <= {"PermissionError", "FileNotFoundError", "ProcessLookupError"}, found[
        "stolen"
    ]
    for question in ("open", "open by run_id alone", "attach"):
        name, said = found["asked"][question]
        assert (name, said.partition(":")[0]) == ("Error", "not_owner"), found["asked"]
    assert RUN not in str(found["asked"]["status"]), "not even that the run exists"
    hoarded = found["hoarded"]
    assert hoarded["slots"] * SLOT_BYTES <= USER_QUOTA_BYTES
    assert hoarded["refusals"], "somewhere it ends"
    assert all("user" in said for said in hoarded["refusals"]), hoarded["refusals"]
    assert not [log for log in logs if "Traceback" in log]
    assert TRAINER_ID != NEIGHBOUR_ID
