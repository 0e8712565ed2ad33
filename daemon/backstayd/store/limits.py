"""How much memory this node may still take, asked before any is taken: the kernel would answer with SIGKILL or SIGBUS.

Three limits count: the operator's quota, every cgroup above this process (v1 or v2) and the tmpfs itself. Reads only.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from backstay.errors import ConfigError

UNLIMITED: Final = 1 << 62
_CGROUP_ROOT: Final = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """One limit: how much it allows in all and how much of that is free now, in bytes."""

    name: str
    total_bytes: int
    free_bytes: int


def limits(
    memory_dir: Path, *, quota_bytes: int, used_bytes: int, cgroup_root: Path = _CGROUP_ROOT
) -> tuple[Limit, ...]:
    """Every limit that holds for ``memory_dir``; ``used_bytes`` is what lies there now, ``quota_bytes`` 0 is none."""
    found = [_tmpfs_limit(memory_dir)]
    if quota_bytes > 0:
        found.append(Limit(name="quota", total_bytes=quota_bytes, free_bytes=quota_bytes - used_bytes))
    found.extend(_cgroup_limits(cgroup_root))
    return tuple(found)


def existing_parent(path: Path) -> Path:
    """``path``, or the nearest directory above it that exists: where it would be made."""
    path = path.absolute()
    while not os.path.exists(path):  # nor may this user look there
        path = path.parent
    return path


def require_usable(memory_dir: Path, place: Path) -> None:
    """Raise ConfigError unless this user may hold snapshots in ``memory_dir``; ``place`` is it, or where it will be made."""
    owner = place.stat().st_uid
    if place == memory_dir.absolute() and owner != os.geteuid():
        raise ConfigError(
            f"memory directory {memory_dir} belongs to user {owner}, this daemon is user "
            f"{os.geteuid()}; its owner could read and replace every snapshot",
            reason="bad_memory_dir",
        )
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise unusable(memory_dir, f"{place} is not a directory that it may write to")


def unusable(memory_dir: Path, why: str) -> ConfigError:
    return ConfigError(
        f"memory directory {memory_dir} cannot be used by user {os.geteuid()}: {why}; give it to that user or "
        "choose another with --memory-dir",
        reason="bad_memory_dir",
    )


def require_tmpfs(memory_dir: Path, place: Path) -> None:
    """Raise ConfigError unless ``place``, where ``memory_dir`` is or will be made, is on a tmpfs."""
    if not is_tmpfs(place):
        raise ConfigError(
            f"memory directory {memory_dir} is not on a tmpfs: mount -t tmpfs -o size=...,mode=0700 backstay {memory_dir}",
            reason="no_tmpfs",
        )


def require_quota(limits: Iterable[Limit], quota_bytes: int) -> None:
    """Raise ConfigError if the quota is more than tmpfs and cgroup can ever hold."""
    for limit in limits:
        if limit.name != "quota" and limit.total_bytes < quota_bytes:
            raise ConfigError(
                f"quota_bytes = {quota_bytes} does not fit: {limit.name} holds {limit.total_bytes} bytes; raise that "
                "limit or lower --quota",
                reason="quota_over_limit",
            )


def is_tmpfs(path: Path) -> bool:
    """Whether ``path`` lies on a tmpfs (or ramfs), from the mount table."""
    device = os.stat(path).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, rest = line.partition(" - ")
        if fields.split()[2] == wanted:
            return rest.split()[0] in ("tmpfs", "ramfs")
    return False


def _tmpfs_limit(memory_dir: Path) -> Limit:
    state = os.statvfs(memory_dir)
    total = state.f_blocks * state.f_frsize or UNLIMITED  # a tmpfs mounted with size=0 has no limit of its own
    free = state.f_bavail * state.f_frsize if state.f_blocks else UNLIMITED
    return Limit(name=f"tmpfs {memory_dir}", total_bytes=total, free_bytes=free)


def _cgroup_limits(root: Path) -> list[Limit]:
    found: list[Limit] = []
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return found
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "" and not (root / "memory").is_dir():
            names = ("memory.max", "memory.current", "inactive_file")
            found += _hierarchy(root, path, *names)
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            found += _hierarchy(root / "memory", path, *names)
    return found


def _hierarchy(root: Path, path: str, limit_name: str, usage_name: str, cache_name: str) -> list[Limit]:
    """The limits of a cgroup and all above it. Clean page cache is given back by the kernel when asked: it counts as free."""
    found = []
    directory = root / path.lstrip("/")
    while True:
        limit = _number(directory / limit_name)
        usage = _number(directory / usage_name)
        if limit is not None and usage is not None and limit < UNLIMITED:
            used = usage - min(usage, _statistic(directory / "memory.stat", cache_name))
            found.append(Limit(name=f"cgroup limit {directory}", total_bytes=limit, free_bytes=limit - used))
        if directory == root or root not in directory.parents:
            return found
        directory = directory.parent


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # absent, or "max"
        return None


def _statistic(path: Path, name: str) -> int:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.split()[0] == name), 0)
