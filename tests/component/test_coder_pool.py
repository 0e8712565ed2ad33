"""The pool against its coders' deaths: they end with their daemon however it ends, and leave no descriptors."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import psutil

from backstayd.coder.jobs import VerifyShard
from backstayd.store.paths import ShardRef
from tests.component.coder_nodes import KEY, RUN, CoderNode, open_descriptors

DAEMON = """
import asyncio, pathlib, socket, sys
from backstayd.coder.pool import CoderPool

async def main():
    sock = socket.create_server(("127.0.0.1", 0))
    pool = CoderPool(count=2, memory_dir=pathlib.Path(sys.argv[1]), incarnation="aa", listen_socket=sock)
    await pool.start()
    print(*pool.pids, flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""

UNKNOWN = ShardRef(run=RUN, key=KEY, rank=0, world_size=1, digest="ab" * 32)


def wait_until(condition: Callable[[], bool], why: str) -> None:
    pause = threading.Event()
    for _ in range(1000):
        if condition():
            return
        pause.wait(0.01)
    raise AssertionError(f"not within 10 s: {why}")


def unknown_shard() -> VerifyShard:
    return VerifyShard(shard=UNKNOWN, deadline_s=10)


def test_coders_die_with_a_daemon_that_is_killed(tmpfs_dir: Path) -> None:
    daemon = subprocess.Popen(
        [sys.executable, "-c", DAEMON, str(tmpfs_dir)], stdout=subprocess.PIPE, text=True, env=os.environ.copy()
    )
    try:
        assert daemon.stdout is not None
        pids = [int(pid) for pid in daemon.stdout.readline().split()]
        assert len(pids) == 2
        assert all(psutil.pid_exists(pid) for pid in pids)
    finally:
        daemon.send_signal(signal.SIGKILL)
        daemon.wait(10)
        if daemon.stdout is not None:
            daemon.stdout.close()
    wait_until(lambda: not any(map(is_running, pids)), "the coders ended with their daemon")


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_killed_coder_is_replaced_and_the_next_job_waits_for_it(tmpfs_dir: Path) -> None:
    async def scenario() -> None:
        node = CoderNode(name="node", directory=tmpfs_dir)
        await node.start()
        try:
            for count in range(2):
                while node.coders.restart_count < count:
                    await asyncio.sleep(0.01)
                assert (await node.coders.run(unknown_shard())).reason == "gone"
                os.kill(node.coders.pids[0], signal.SIGKILL)
                while node.coders.pids and is_running(node.coders.pids[0]):
                    await asyncio.sleep(0.01)
            reasons = [(await node.coders.run(unknown_shard())).reason]
            while reasons[-1] == "coder_died" and len(reasons) < 3:  # given to the dead one before its death was seen
                reasons.append((await node.coders.run(unknown_shard())).reason)
            assert reasons[-1] == "gone"
            assert node.coders.restart_count == 2
        finally:
            await node.close()

    asyncio.run(scenario())


def test_a_frozen_coder_is_given_up_at_the_deadline(tmpfs_dir: Path) -> None:
    async def scenario() -> None:
        node = CoderNode(name="node", directory=tmpfs_dir)
        await node.start()
        (pid,) = node.coders.pids
        try:
            assert (await node.coders.run(unknown_shard())).reason == "gone"
            os.kill(pid, signal.SIGSTOP)
            job = VerifyShard(shard=UNKNOWN, deadline_s=0.1)
            assert (await node.coders.run(job)).reason == "deadline"
        finally:
            await node.close()
        assert not is_running(pid)

    asyncio.run(scenario())


def test_starting_and_closing_pools_leaks_no_descriptor(tmpfs_dir: Path) -> None:
    async def scenario() -> None:
        node = CoderNode(name="node", directory=tmpfs_dir)
        await node.start()
        assert (await node.coders.run(unknown_shard())).reason == "gone"
        await node.close()

    asyncio.run(scenario())
    before = open_descriptors()
    for _ in range(3):
        asyncio.run(scenario())
    assert open_descriptors() == before
