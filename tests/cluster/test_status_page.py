"""A real cluster looked at while a node is lost: in a real Chromium, on a terminal, through a pipe; and with many nodes."""

from __future__ import annotations

import contextlib
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from backstay.testing import LocalCluster
from backstay.testing.cluster import process_environment
from backstay.testing.command_process import CommandProcess
from backstay.testing.wait import wait_until
from tests.kit.chromium import Page, browse
from tests.kit.command import printed
from tests.kit.light_world import light_world, wait_protected
from tests.kit.wording import says

CLUSTER = {"nodes": 6, "lease_s": 2.0}
RUN = "default/gpt-7b"
MANY = 120


@contextlib.contextmanager
def watching(cluster: LocalCluster, stdout: int) -> Iterator[subprocess.Popen[bytes]]:
    argv = [sys.executable, "-m", "backstayd.cli", "status", "--watch", "--coordinator", cluster.coordinator_address]
    environment = process_environment() | {"BACKSTAY_INSECURE": "true", "COLUMNS": "150", "LINES": "50"}
    # Under nohup a child would begin with SIGINT ignored; at a terminal it does not.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(argv, stdout=stdout, stderr=subprocess.PIPE, env=environment, start_new_session=True)
    finally:
        signal.signal(signal.SIGINT, before)
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=20)


def read_so_far(fd: int, seen: list[bytes]) -> str:
    with contextlib.suppress(BlockingIOError, OSError):
        while chunk := os.read(fd, 1 << 16):
            seen.append(chunk)
    return b"".join(seen).decode(errors="replace")


def headline(page: Page) -> str:
    return f"{page.text('.job .verdict')}; {page.text('.job .why')}"


def test_a_lost_node_and_the_return_of_protection_are_seen_without_a_reload(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    read_end, write_end = os.pipe()
    os.set_blocking(read_end, False)
    lines: list[bytes] = []
    with (
        browse(tmp_path) as page,
        watching(cluster, write_end) as watcher,
        light_world(cluster, RUN) as ranks,
    ):
        os.close(write_end)
        page.open(f"http://127.0.0.1:{cluster.coordinator_http_port}/")
        page.evaluate("window.isSamePage = true")
        ranks.start_fresh()
        ranks.protect(1)
        wait_until(lambda: says("page_protected", headline(page), count=2), deadline_s=30, why="protected")
        page.evaluate(
            "window.words = []; new MutationObserver(() => words.push(document.querySelector('.job')?.innerText ?? ''))"
            ".observe(document.getElementById('jobs'), {childList: true, subtree: true})"
        )
        cluster.destroy_node(2)

        def was_degraded() -> bool:
            return bool(
                page.evaluate("words.some((text) => /degraded|at risk/.test(text) && /node-2 is lost/.test(text))")
            )

        wait_until(was_degraded, deadline_s=30, why="the page to say what is degraded and why")
        wait_until(lambda: page.text("#nodes li").split() == ["node-2", "lost"], deadline_s=30, why="the lost node")
        assert says("node_silent", page.text("#events"), node="node-2")
        wait_until(lambda: says("page_protected", headline(page), count=2), deadline_s=60, why="repaired")
        assert page.text("#events").count("rebuilt") >= 1
        assert page.evaluate("window.isSamePage") is True
        assert page.complaints == []
        wait_until(lambda: says("watch_protected", read_so_far(read_end, lines), count=2), deadline_s=20, why="a line")
        text = read_so_far(read_end, lines)
        assert "node-2: lost" in text
        assert "\x1b" not in text
        watcher.send_signal(signal.SIGINT)
        assert watcher.wait(timeout=20) == 130
    os.close(read_end)


def test_both_watches_outlive_a_coordinator_and_say_that_it_is_away(cluster: LocalCluster, tmp_path: Path) -> None:
    main, terminal = pty.openpty()
    os.set_blocking(main, False)
    seen: list[bytes] = []
    with browse(tmp_path) as page, watching(cluster, terminal) as watcher:
        os.close(terminal)
        page.open(f"http://127.0.0.1:{cluster.coordinator_http_port}/")
        wait_until(lambda: page.text("#freshness") == "live", deadline_s=30, why="the page to be live")
        wait_until(lambda: "NODES  6 nodes" in read_so_far(main, seen), deadline_s=30, why="the first picture")
        cluster.kill_coordinator()
        wait_until(lambda: page.text("#freshness").startswith("stale"), deadline_s=30, why="the page to be stale")
        wait_until(
            lambda: says("watch_no_answer", read_so_far(main, seen)), deadline_s=30, why="the terminal to say so"
        )
        assert "node-0" in page.text("#nodes")
        assert says("page_is_stale", page.text("#notice"))
        seen.clear()
        cluster.start_coordinator()
        wait_until(lambda: page.text("#freshness") == "live", deadline_s=30, why="the page to be live again")
        wait_until(lambda: "\x1b[Hcoordinator" in read_so_far(main, seen) or "every 1 s" in read_so_far(main, seen),
                   deadline_s=30, why="the terminal to go on")  # fmt: skip
        watcher.send_signal(signal.SIGINT)
        assert watcher.wait(timeout=20) == 130
        assert "\x1b[?1049l" in read_so_far(main, seen), "the terminal is left as it was"
    os.close(main)


def ask(fleet: CommandProcess, do: str, **arguments: Any) -> dict[str, Any]:
    fleet.send(do, **arguments)
    return fleet.receive()


def test_many_nodes_are_protected_seen_and_lost_over_real_lines() -> None:
    with LocalCluster(1, lease_s=2.0) as cluster:
        environment = process_environment()
        environment["PYTHONPATH"] += os.pathsep + str(Path(__file__).parents[2])
        argv = [sys.executable, "-m", "tests.kit.many_nodes", cluster.coordinator_address, str(MANY), "1", "2.0"]
        fleet = CommandProcess(argv, name="fleet", environment=environment, log=cluster.keeper.log_dir / "fleet.log")
        try:
            ask(fleet, "join")
            ask(fleet, "train")
            cluster.wait_until(lambda: ask(fleet, "count")["training"] == MANY, 60, why="every rank to train")
            for step in (1, 2):
                ask(fleet, "snapshot", step=step)
                wait_protected(cluster, "many/run-1", step)
            ask(fleet, "lose", name="node-0007")
            cluster.wait_until(
                lambda: cluster.run_status("many/run-1")["spares"] == 1, 30, why="the loss to be counted"
            )
            verdict = cluster.run_status("many/run-1")["verdict"]
            assert verdict["survives"] == 1
            assert "node-0007" in verdict["reason"]
            status = printed(cluster, "status")
            assert f"{MANY} live, 1 lost" in status
            assert says("nodes_not_listed", status, count=MANY)
            assert says("weaker_groups", status, count=1)
        finally:
            fleet.close()
