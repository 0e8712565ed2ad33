"""The Unix socket trainers connect to: made with care, never taken from another running daemon."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

from backstay.errors import ConfigError

SOCKET_MODE = 0o660


def listen(path: Path) -> socket.socket:
    """A listening socket at ``path``; a stale socket file is replaced.

    Raises:
        ConfigError: a daemon listens there, something else lies there, or the directory cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(path)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.bind(str(path))
            os.chmod(path, SOCKET_MODE)
            sock.listen(256)
            sock.setblocking(False)
        except BaseException:
            sock.close()
            raise
    except OSError as error:
        raise ConfigError(
            f"cannot listen on the socket {path} as user {os.geteuid()}: {error.strerror or error}; choose another --socket "
            "or give that user its directory",
            reason="bad_socket",
        ) from error
    return sock


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
            pass  # it answers slowly, which a stale file does not
    raise ConfigError(f"another daemon listens on {path}; choose another --socket", reason="socket_in_use")
