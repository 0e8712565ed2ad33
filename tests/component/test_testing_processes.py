"""A node that can be destroyed whole: its processes are found whatever they did to hide, and none is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from backstay.errors import UnavailableError
from backstay.testing.ports import free_port
from backstay.testing.processes import CLUSTER_MARK, ProcessKeeper, marked_processes
from backstay.testing.wait import DeadlineError, wait_until

_HIDING = """
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(300)
    os._exit(0)
time.sleep(300)
"""

_ORPHANING = """
import sys, time
from pathlib import Path
from backstay.testing.guardian import guarded
from backstay.testing.processes import ProcessKeeper
root = Path(sys.argv[1])
with guarded("{cluster_id}", root):
    keeper = ProcessKeeper("{cluster_id}", root / "logs")
    keeper.spawn([sys.executable, "-c", "import time; time.sleep(300)"], name="child")
    print("up", flush=True)
    time.sleep(300)
"""


@pytest.fixture
def keeper(tmpfs_dir: Path) -> Iterator[ProcessKeeper]:
    keeper = ProcessKeeper(f"test-{os.getpid()}", tmpfs_dir / "logs")
    yield keeper
    keeper.kill()
    assert keeper.pids() == []


def test_a_process_in_another_session_whose_parent_died_is_found_and_killed(keeper: ProcessKeeper) -> None:
    child = keeper.spawn([sys.executable, "-c", _HIDING], name="hiding", node="node-0")
    # the parent, and the grandchild that left its session and its parent: two sleepers in two sessions
    wait_until(
        lambda: len({os.getsid(pid) for pid in keeper.pids(node="node-0")}) == 2 and len(keeper.pids()) == 2,
        deadline_s=20,
        why="a grandchild in a session of its own",
    )
    killed = keeper.kill(node="node-0")
    assert len(killed) == 2
    assert child.wait(10) == -signal.SIGKILL
    assert keeper.pids() == []


def test_killing_one_node_or_role_spares_the_others(keeper: ProcessKeeper) -> None:
    sleeper = [sys.executable, "-c", "import time; time.sleep(300)"]
    first = keeper.spawn(sleeper, name="a", node="node-0", role="daemon")
    second = keeper.spawn(sleeper, name="b", node="node-0", role="work")
    third = keeper.spawn(sleeper, name="c", node="node-1", role="daemon")
    keeper.kill(node="node-0", role="daemon")
    assert (first.poll(), second.poll(), third.poll()) == (-signal.SIGKILL, None, None)
    keeper.kill(node="node-0")
    assert (second.poll(), third.poll()) == (-signal.SIGKILL, None)


def test_the_guardian_cleans_up_after_a_test_that_was_killed_itself(tmpfs_dir: Path) -> None:
    cluster_id = f"guarded-{os.getpid()}"
    test = subprocess.Popen(
        [sys.executable, "-c", _ORPHANING.format(cluster_id=cluster_id), str(tmpfs_dir)],
        stdout=subprocess.PIPE,
        env=dict(os.environ) | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert test.stdout is not None
    with test.stdout:
        assert test.stdout.readline() == b"up\n"
    assert marked_processes({CLUSTER_MARK: cluster_id})
    test.kill()
    test.wait()
    wait_until(lambda: not marked_processes({CLUSTER_MARK: cluster_id}), deadline_s=20, why="the child to be killed")
    wait_until(lambda: not tmpfs_dir.exists(), deadline_s=20, why="the directory to be deleted")
    tmpfs_dir.mkdir()  # the fixture deletes it


def test_waiting_in_vain_says_for_what_how_long_and_what_was_seen() -> None:
    def refused() -> bool:
        raise UnavailableError("connection refused")

    with pytest.raises(DeadlineError) as caught:
        wait_until(refused, deadline_s=0.1, why="the moon", evidence=lambda: "log: nothing")
    assert (
        str(caught.value) == "waited 0.1 s for the moon, in vain: the last try failed: connection refused\nlog: nothing"
    )


def test_waiting_returns_the_value_that_ended_it() -> None:
    values = iter([0, "", "here"])
    assert wait_until(lambda: next(values), deadline_s=10, why="a value", poll_s=0.001) == "here"


def test_ports_are_never_handed_out_twice() -> None:
    ports = [free_port() for _ in range(50)]
    assert len(set(ports)) == 50
