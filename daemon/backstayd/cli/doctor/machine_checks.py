"""Checks of the machine for `backstay doctor`: tmpfs, cgroup, limits, swap and ports. Changes nothing.

Limits are those of the daemon's process if its pid is known, else of this shell.
"""

from __future__ import annotations

import errno
import os
import re
import resource
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

from backstayd.addresses import split_address
from backstayd.cli.doctor.findings import Finding, fail, ok, warn
from backstayd.units import format_size

MIN_FILES: Final = 4096  # slots, shards and peers of a busy node, with room to spare
_UNLIMITED_BYTES: Final = 1 << 60  # cgroup v1 writes a huge number for "no limit"
_OCTAL: Final = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mount:
    """The mount a path lies on."""

    point: Path
    kind: str  # "tmpfs", "ext4"


def find_mount(path: Path, mountinfo: str) -> Mount:
    """The mount that holds ``path`` (absolute, resolved), from the text of /proc/self/mountinfo."""
    best = Mount(point=Path("/"), kind="unknown")
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        if len(before.split()) < 5 or not after.split():
            continue
        point = Path(_OCTAL.sub(lambda match: chr(int(match[1], 8)), before.split()[4]))
        # A later line covers an earlier one of the same place.
        if path.is_relative_to(point) and len(point.parts) >= len(best.point.parts):
            best = Mount(point=point, kind=after.split()[0])
    return best


def check_memory_dir(memory_dir: Path, *, pid: int | None, mountinfo: Path = Path("/proc/self/mountinfo")) -> Finding:
    """Whether ``memory_dir`` is on a tmpfs of its own, and how large that is."""
    subject = "memory directory"
    existing = memory_dir
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    mount = find_mount(existing.resolve(), mountinfo.read_text(encoding="utf-8"))
    if mount.kind != "tmpfs":
        advice = f"mount -t tmpfs -o size=...,mode=0700 backstay {memory_dir}"
        return fail(
            subject, f"{memory_dir} is on {mount.kind} (mount {mount.point}), not on a tmpfs; mount one: {advice}"
        )
    figures = os.statvfs(existing)
    total, free = figures.f_blocks * figures.f_frsize, figures.f_bavail * figures.f_frsize
    sizes = f"{memory_dir} on tmpfs {mount.point}: {format_size(free)} free of {format_size(total)}"
    if total == 0:
        return warn(
            subject,
            f"{sizes}: without size= the kernel kills processes instead of refusing writes; remount it with a size",
        )
    if not memory_dir.exists():
        return warn(subject, f"{sizes}, but the directory does not exist yet; the daemon creates it")
    if pid is None and memory_dir.stat().st_uid == os.getuid() and not os.access(memory_dir, os.W_OK | os.X_OK):
        return fail(subject, f"{sizes}, but uid {os.getuid()} cannot write to it")
    if mount.point == Path("/dev/shm"):  # noqa: S108 - named, not used
        return warn(
            subject, f"{sizes}; /dev/shm is shared and is cleared at logout (RemoveIPC): mount a tmpfs of its own"
        )
    return ok(subject, sizes)


def cgroup_limit(
    pid: int | None, *, root: Path = Path("/sys/fs/cgroup"), proc: Path = Path("/proc")
) -> tuple[int, Path] | None:
    """The lowest memory limit over the process's cgroup and its ancestors (bytes, the file it is set in), or None."""
    lines = (proc / str(pid or "self") / "cgroup").read_text(encoding="utf-8").splitlines()
    found: list[tuple[int, Path]] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, name = (root / "unified" if (root / "unified").is_dir() else root), "memory.max"
        elif "memory" in controllers.split(","):
            base, name = root / "memory", "memory.limit_in_bytes"
        else:
            continue
        place = base / path.lstrip("/")
        while place.is_relative_to(base):
            text = _read(place / name)
            if text.isdigit() and int(text) < _UNLIMITED_BYTES:
                found.append((int(text), place / name))
            place = place.parent
    return min(found, default=None)


def check_cgroup(memory_dir: Path, *, pid: int | None) -> Finding:
    """Whether the daemon's cgroup lets it fill its tmpfs."""
    subject, whose = "cgroup memory limit", _whose(pid)
    try:
        limit = cgroup_limit(pid)
        figures = os.statvfs(memory_dir)
    except OSError as error:
        return warn(subject, f"cannot be read for {whose}: {error.strerror}")
    total = figures.f_blocks * figures.f_frsize
    if limit is None:
        return ok(subject, f"none for {whose}")
    text = f"{format_size(limit[0])} for {whose} ({limit[1]})"
    if limit[0] < total:
        return warn(subject, f"{text}, less than the {format_size(total)} of the tmpfs: the daemon stops at the limit")
    return ok(subject, text)


def check_locked_memory(pid: int | None) -> Finding:
    """RLIMIT_MEMLOCK, which pinning a slot for a GPU or RDMA counts against."""
    subject = "locked memory limit"
    soft = _limit(pid, "Max locked memory", resource.RLIMIT_MEMLOCK)
    if soft is None:
        return ok(subject, f"unlimited for {_whose(pid)}")
    text = f"{format_size(soft)} for {_whose(pid)}"
    if soft < 1 << 30:
        return warn(
            subject,
            f"{text}: registering slots with a GPU may fail, which makes capture slower; raise it (LimitMEMLOCK=)",
        )
    return ok(subject, text)


def check_files(pid: int | None) -> Finding:
    """RLIMIT_NOFILE."""
    subject = "open files limit"
    soft = _limit(pid, "Max open files", resource.RLIMIT_NOFILE)
    if soft is None or soft >= MIN_FILES:
        return ok(subject, f"{'unlimited' if soft is None else soft} for {_whose(pid)}")
    text = f"{soft} for {_whose(pid)}; raise it to {MIN_FILES} or more (LimitNOFILE=)"
    return fail(subject, text) if soft < 256 else warn(subject, text)


def check_swap() -> Finding:
    """tmpfs pages can be swapped out; a snapshot in swap is neither fast nor private."""
    swap = psutil.swap_memory()
    if swap.total == 0:
        return ok("swap", "off")
    swappiness = _read(Path("/proc/sys/vm/swappiness")) or "?"
    return warn(
        "swap",
        f"{format_size(swap.used)} used of {format_size(swap.total)}, swappiness {swappiness}: "
        "tmpfs pages may be written to disk; run swapoff -a",
    )


def check_address(address: str, *, daemon_pid: int | None) -> Finding:
    """Whether ``address`` can be bound, or which process uses it."""
    subject = f"port {address}"
    try:
        host, port = split_address(address)
    except ValueError as error:
        return fail(subject, str(error))
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            return fail(subject, f"cannot be bound: {error.strerror or error}")
        user = _listener(port)
        if user is None:
            return warn(subject, "in use by a process that this user cannot see")
        name = user.name()
        is_ours = user.pid == daemon_pid or "backstayd" in " ".join(user.cmdline())
        return (ok if is_ours else fail)(subject, f"in use by {name} (pid {user.pid})")
    return ok(subject, "free")


def _listener(port: int) -> psutil.Process | None:
    try:
        for connection in psutil.net_connections(kind="tcp"):
            if connection.status == psutil.CONN_LISTEN and tuple(connection.laddr)[1:] == (port,) and connection.pid:
                return psutil.Process(connection.pid)
    except (psutil.Error, OSError):
        return None
    return None


def _limit(pid: int | None, name: str, which: int) -> int | None:
    """The soft limit, None for unlimited; of ``pid`` where it may be read, else of this process."""
    if pid is not None:
        for line in _read(Path(f"/proc/{pid}/limits")).splitlines():
            if line.startswith(name):
                value = line[len(name) :].split()[0]
                return None if value == "unlimited" else int(value)
    soft = resource.getrlimit(which)[0]
    return None if soft == resource.RLIM_INFINITY else soft


def _whose(pid: int | None) -> str:
    return f"the daemon (pid {pid})" if pid is not None else "this shell"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
