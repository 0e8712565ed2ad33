"""Shared by all tiers: markers, a tmpfs directory per test, and the check that a test file leaves nothing behind."""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

import backstayd.transport  # noqa: F401 - it tells gRPC which ciphers to speak, which must be said before anything loads gRPC

TMPFS = Path("/dev/shm")
# Daemons and commands that tests start speak plaintext on loopback; tests of TLS take these away.
os.environ.update(BACKSTAYD_NODE_INSECURE="true", BACKSTAYD_COORDINATOR_INSECURE="true", BACKSTAY_INSECURE="true")
LEFTOVER_DEADLINE_S = 10.0  # dead children are reaped and threads end in their own time
# Helpers that Python and torch keep for the life of the process.
_STANDING = ("multiprocessing.resource_tracker", "multiprocessing.forkserver", "torch/_inductor")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything under tests/cluster is of the cluster tier, whether it says so or not."""
    for item in items:
        if "cluster" in item.path.relative_to(Path(__file__).parent).parts[:-1]:
            item.add_marker(pytest.mark.cluster)


@pytest.fixture(scope="session")
def deepspeed_compiled(tmp_path_factory: pytest.TempPathFactory) -> None:
    """DeepSpeed with what it compiles at its first use, which beside other tests outlasts the deadlines of any of them.

    It compiles under a lock file that a killed test run would leave for ever, hence in one place per run.
    """
    pytest.importorskip("deepspeed")
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base
    os.environ["TORCH_EXTENSIONS_DIR"] = str(shared / "torch-extensions")
    code = "from deepspeed.comm.torch import build_shm_op; build_shm_op()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=900)


@pytest.fixture
def tmpfs_dir(request: pytest.FixtureRequest) -> Iterator[Path]:
    """An empty directory on tmpfs, private to the test and deleted after it."""
    name = "".join(character if character.isalnum() else "-" for character in request.node.name)[:40]
    path = TMPFS / f"backstay-test-{os.getpid()}-{name}-{time.monotonic_ns()}"
    path.mkdir(mode=0o700)
    try:
        yield path
    finally:
        shutil.rmtree(path)


@pytest.fixture(scope="module", autouse=True)
def nothing_left_over(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail the file whose tests leave processes, threads, open tmpfs files or tmpfs directories of their own behind."""
    before = {kind: look() for kind, look in _LEFTOVERS.items()}
    yield
    deadline = time.monotonic() + LEFTOVER_DEADLINE_S
    pause = threading.Event()
    while True:
        gc.collect()
        left = {kind: sorted(look() - before[kind]) for kind, look in _LEFTOVERS.items()}
        if not any(left.values()):
            return
        if time.monotonic() > deadline:
            pytest.fail(f"{request.node.name} left behind: { {kind: found for kind, found in left.items() if found} }")
        pause.wait(0.05)


def _children() -> set[str]:
    found = set()
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            command = " ".join(child.cmdline()) or child.name()
            if child.status() != psutil.STATUS_ZOMBIE and not any(name in command for name in _STANDING):
                found.add(f"pid {child.pid}: {command[:120]}")
    return found


def _threads() -> set[str]:
    """Non-daemon threads, and backstay's own whatever they are."""
    threads = (thread for thread in threading.enumerate() if thread is not threading.main_thread())
    return {
        f"{thread.name} ({thread.ident})"
        for thread in threads
        if thread.is_alive()
        and not thread.name.startswith("pytest_timeout")
        and (not thread.daemon or thread.name.startswith("backstay"))
    }


def _tmpfs_files() -> set[str]:
    found = set()
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            target = os.readlink(f"/proc/self/fd/{entry}")
            if target.startswith(f"{TMPFS}/backstay"):
                found.add(f"fd {entry}: {target}")
    return found


def _tmpfs_directories() -> set[str]:
    """Directories named after this process: those of other runs on the machine are not ours to judge."""
    return {str(path) for path in TMPFS.glob(f"backstay*-{os.getpid()}-*")}


_LEFTOVERS: dict[str, Callable[[], set[str]]] = {
    "processes": _children,
    "threads": _threads,
    "open files": _tmpfs_files,
    "directories": _tmpfs_directories,
}
