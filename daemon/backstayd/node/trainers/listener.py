"""The Unix socket that trainers connect to; never taken from another running daemon."""

from __future__ import annotations

import grp
import os
import socket
import stat
from pathlib import Path

from backstay.errors import ConfigError

SOCKET_MODE = 0o660


def listen(path: Path, *, group: str = "") -> socket.socket:
    """A listening socket at ``path``, open to ``group`` ("": this process's own); a stale socket file is replaced.

    Raises:
        ConfigError: a daemon listens there, something else lies there, or the directory cannot be written.
    """
    group_id = find_group(group) if group else None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(path)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.bind(str(path))
            if group_id is not None:  # only then: the system call filter of an older unit may forbid chown
                os.chown(path, -1, group_id)
            os.chmod(path, SOCKET_MODE)
            sock.listen(256)
            sock.setblocking(False)
        except BaseException:
            sock.close()
            raise
    except OSError as error:
        raise ConfigError(
            f"cannot listen on the socket {path} as user {os.geteuid()}: {error.strerror or error}; choose another --socket "
            "or give that user write access to its directory",
            reason="bad_socket",
        ) from error
    return sock


def find_group(name: str) -> int:
    """The id of a group, by name or number, that this process may give a file to; raises ConfigError."""
    try:
        found = int(name) if name.isdigit() else grp.getgrnam(name).gr_gid
    except KeyError:
        raise ConfigError(
            f"socket_group {name!r} does not exist on this machine; create it (groupadd --system {name}) or name another",
            reason="bad_socket_group",
        ) from None
    if os.geteuid() != 0 and found not in (os.getegid(), *os.getgroups()):
        raise ConfigError(
            f"user {os.geteuid()} cannot give the socket to socket_group {name!r}: it is not a member; make it one "
            f"(SupplementaryGroups={name} in the unit)",
            reason="bad_socket_group",
        )
    return found


def _remove_stale(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError(
            f"{path} exists and is not a socket; remove it or choose another --socket", reason="bad_socket"
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except OSError:
            pass  # it is slow to answer; a stale file refuses at once
    raise ConfigError(f"another daemon listens on {path}; choose another --socket", reason="socket_in_use")
