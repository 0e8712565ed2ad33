"""Which process may still write a slot, judged by pidfd: the end of a socket says nothing (a forked worker keeps it open).

A holder is written beside the slots, so that a restarted daemon knows it too. Sends no signals.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

SO_PEERPIDFD: Final = 77  # Linux 6.5; the pidfd of who connected, without a race for its pid


@dataclass(frozen=True, slots=True, kw_only=True)
class HolderRecord:
    """Identity of a process on this boot: its pid and start time in clock ticks since boot."""

    pid: int
    start_ticks: int


class Holder:
    """A process that was given a slot. Owns a pidfd; close it."""

    def __init__(self, record: HolderRecord, pidfd: int) -> None:
        self.record = record
        self.pidfd = pidfd

    @classmethod
    def find(cls, record: HolderRecord) -> Holder | None:
        """The process of ``record`` if it still lives under that pid; OSError when that cannot be told."""
        try:
            pidfd = os.pidfd_open(record.pid)
        except OverflowError:
            return None
        except OSError as error:
            if error.errno in (errno.ESRCH, errno.EINVAL):
                return None
            raise
        if start_ticks(record.pid) != record.start_ticks:
            os.close(pidfd)
            return None
        return cls(record, pidfd)

    @property
    def is_alive(self) -> bool:
        """Whether the process has not ended; a zombie has."""
        if self.pidfd < 0:
            return False
        poller = select.poll()
        poller.register(self.pidfd, select.POLLIN)
        return not poller.poll(0)

    def close(self) -> None:
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerCredentials:
    pid: int
    uid: int
    gid: int


def peer_credentials(connection: socket.socket) -> PeerCredentials:
    """Who connected, as the kernel says (SO_PEERCRED)."""
    pid, uid, gid = struct.unpack("iII", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return PeerCredentials(pid=pid, uid=uid, gid=gid)


def peer_holder(connection: socket.socket) -> Holder | None:
    """The process that connected, or None when it is dead already or invisible from here (another pid namespace)."""
    pid = peer_credentials(connection).pid
    if pid <= 0:
        return None
    pidfd = -1
    with contextlib.suppress(OSError):
        pidfd = connection.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
        os.set_inheritable(pidfd, False)
    if pidfd < 0:
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:
            return None
    holder = Holder(HolderRecord(pid=pid, start_ticks=start_ticks(pid)), pidfd)
    if not holder.is_alive or holder.record.start_ticks == 0:
        holder.close()
        return None
    return holder


def start_ticks(pid: int) -> int:
    """Start time of a process (field 22 of /proc/PID/stat), 0 when there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    return int(text.rpartition(")")[2].split()[19])
