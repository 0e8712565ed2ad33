"""The trainer's connection to its node's daemon: requests (:mod:`messages`) over one Unix socket, each with a deadline.

Must never block longer than its deadline, whatever the daemon does, and never outlive a fork: a child that shared the
socket could send in its parent's name, and would keep it open after the parent's death.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, Final, TypeVar

from backstay._version import __version__
from backstay.errors import (
    ERROR_CLASSES,
    BackstayError,
    ConfigError,
    IntegrityError,
    UnavailableError,
    UsageError,
)
from backstay.format import versions
from backstay.protocol import framing, messages

T = TypeVar("T")
OnProgress = Callable[[messages.Progress], None]

DEFAULT_SILENCE_S: Final = 30.0  # longest pause between two messages while a decision is made
RESTORE_GRACE_S: Final = 2.0  # for the daemon's own error at the deadline, which says more

_connections: weakref.WeakSet[DaemonConnection] = weakref.WeakSet()
_child_cleanups: list[Callable[[], None]] = []


class DaemonConnection:
    """One session with the daemon; thread-safe, one request at a time.

    Invariant: after a timeout, end of file or malformed frame the connection is closed, because a late reply could be taken for
    the next one. An Error reply leaves it open. In a forked child it is closed from the start.
    """

    def __init__(self, socket_path: str, *, timeout_s: float) -> None:
        """Connect within ``timeout_s``.

        Raises:
            UnavailableError: nobody listens there, or nobody accepts in time. ConfigError: the path is not usable.
        """
        self.socket_path = socket_path
        self.silence_s = DEFAULT_SILENCE_S
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._message_id = 0
        self._is_closed = False
        self._socket = _connect(socket_path, timeout_s)
        _connections.add(self)

    def attach(self, message: messages.Attach, *, deadline_s: float) -> messages.Attached:
        """Open the session; raises ConfigError for a daemon of a protocol that this client does not support."""
        attached = self._expect(message, messages.Attached, deadline_s)
        daemon = versions.Side(
            name=f"the daemon at {self.socket_path}", release=attached.daemon_version, protocol=attached.protocol
        )
        own = versions.Side(name="this trainer", release=__version__, protocol=messages.PROTOCOL_VERSION)
        problem = versions.why_apart(own, daemon)
        if problem:
            self.close()
            raise ConfigError(problem, reason="protocol_version")
        return attached

    def _leave(self) -> None:
        """Release the connection; a thread that closed the session meanwhile left the socket to this one."""
        if self._is_closed:
            self._socket.close()
        self._lock.release()

    def is_lost(self) -> bool:
        """Whether the daemon has closed its end; never waits, and returns False while another thread uses the connection."""
        if self._is_closed or not self._lock.acquire(blocking=False):
            return False
        try:
            poll = select.poll()  # a socket with a timeout would wait for it, whatever flags recv is given
            poll.register(self._socket, select.POLLIN)
            return bool(poll.poll(0)) and self._socket.recv(1, socket.MSG_PEEK) == b""
        except OSError:
            return True
        finally:
            self._leave()

    def call(self, message: Any, *, deadline_s: float) -> tuple[Any, list[int]]:
        """Send one request and return its reply, with any descriptors, which the caller must close.

        Raises:
            BackstayError: the class that an Error reply names. UnavailableError: no reply within ``deadline_s``, or the
                daemon is gone. IntegrityError: the reply is not one of the local protocol.
        """
        return self._exchange(message, time.monotonic() + deadline_s)

    def open(self, run: str, step: int, *, deadline_s: float) -> messages.Offer:
        """Visit a complete snapshot of ``run``, without a world; ``step`` 0 is the newest that can be read.

        Raises:
            SnapshotNotFoundError: there is none. IntegrityError: another step was offered; or as :meth:`call`.
        """
        offer: messages.Offer = self._expect(messages.Open(run=run, step=step), messages.Offer, deadline_s)
        if step not in (0, offer.step):
            raise IntegrityError(
                f"daemon at {self.socket_path} offered step {offer.step} of {run}, not step {step}; not used",
                reason="bad_reply",
            )
        return offer

    def restore(
        self, message: messages.Restore, on_progress: OnProgress
    ) -> tuple[messages.Restored | messages.Offer, list[int]]:
        """Wait for the world's decision, up to ``message.deadline_s`` and no longer than ``silence_s`` without any message.

        Returns:
            The decision and the shards' descriptors (``RestoredShard.fd_index`` counts in them), which the caller closes; or,
            without any, an Offer of a snapshot in another layout.

        Raises:
            As :meth:`call`. What ``on_progress`` raises ends the session.
        """
        reply, fds = self._await(message, on_progress)
        if isinstance(reply, messages.Offer):
            framing.close_fds(fds)
            return reply, fds
        self._check_descriptors(message, reply, fds, messages.Restored)
        return reply, fds

    def fetch(self, message: messages.Fetch, on_progress: OnProgress) -> tuple[messages.Fetched, list[int]]:
        """Have chunks of an offered snapshot brought here; returns and raises as :meth:`restore`."""
        reply, fds = self._await(message, on_progress)
        self._check_descriptors(message, reply, fds, messages.Fetched)
        return reply, fds

    def gate(self, message: messages.Gate, on_progress: OnProgress) -> messages.GateAnswer:
        """Wait until what all ranks loaded was compared; deadlines and errors as :meth:`restore`."""
        reply, fds = self._await(message, on_progress)
        return self._checked(message, reply, fds, messages.GateAnswer)

    def close(self) -> None:
        """End the session; a call that waits in another thread gets UnavailableError. Idempotent."""
        if os.getpid() != self._pid:
            self.close_in_child()
            return
        self._is_closed = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes a thread that waits on it; close() alone would not
        if self._lock.acquire(blocking=False):  # else that thread closes it
            self._socket.close()
            self._lock.release()

    def close_in_child(self) -> None:
        """Drop a forked child's copy of the socket; the parent's session continues. Takes no lock: its holder may be gone."""
        self._is_closed = True
        with contextlib.suppress(OSError):
            self._socket.close()

    def _expect(self, message: Any, kind: type[T], deadline_s: float) -> T:
        reply, fds = self.call(message, deadline_s=deadline_s)
        return self._checked(message, reply, fds, kind)

    def _checked(self, message: Any, reply: Any, fds: list[int], kind: type[T]) -> T:
        """``reply``, if it is of ``kind``; it has no use for descriptors."""
        framing.close_fds(fds)
        if not isinstance(reply, kind):
            self.close()
            raise IntegrityError(
                f"daemon at {self.socket_path} answered {type(message).__name__} with {type(reply).__name__}, "
                f"not {kind.__name__}",
                reason="bad_reply",
            )
        return reply

    def _check_descriptors(self, message: Any, reply: Any, fds: list[int], kind: type[Any]) -> None:
        fd_count = len(fds)
        if isinstance(reply, kind) and all(0 <= s.fd_index < fd_count for s in reply.shards):
            return
        framing.close_fds(fds)
        self.close()
        raise IntegrityError(
            f"daemon at {self.socket_path} answered {type(message).__name__} with {type(reply).__name__} and {fd_count} "
            "descriptors, not with one for each shard; not used",
            reason="bad_reply",
        )

    def _await(self, message: Any, on_progress: OnProgress) -> tuple[Any, list[int]]:
        return self._exchange(message, time.monotonic() + message.deadline_s + RESTORE_GRACE_S, on_progress)

    def _exchange(self, message: Any, deadline: float, on_progress: OnProgress | None = None) -> tuple[Any, list[int]]:
        started = time.monotonic()
        self._check_usable()
        if not self._lock.acquire(timeout=max(0.0, deadline - started)):
            raise UnavailableError(
                f"{type(message).__name__} to the daemon at {self.socket_path} waited {time.monotonic() - started:.1f} s "
                "for another call of this process to end; try again",
                reason="busy",
            )
        try:
            self._check_usable()
            reply, fds = self._converse(message, deadline, on_progress)
        except BaseException as error:
            self._is_closed = True
            self._socket.close()
            if isinstance(error, OSError):  # TimeoutError and ConnectionError among them
                raise self._unavailable(error, message, time.monotonic() - started) from error
            raise
        finally:
            if self._is_closed:  # close() came while this thread held the lock
                self._socket.close()
            self._lock.release()
        if isinstance(reply, messages.Error):
            framing.close_fds(fds)
            raise ERROR_CLASSES.get(reply.error_class, BackstayError)(reply.message, reason=reply.reason)
        return reply, fds

    def _converse(self, message: Any, deadline: float, on_progress: OnProgress | None) -> tuple[Any, list[int]]:
        self._message_id += 1
        until = deadline if on_progress is None else min(deadline, time.monotonic() + self.silence_s)
        slot_bytes = message.manifest.get("size_bytes", 0) if isinstance(message, messages.Commit) else 0
        limit_bytes = messages.request_limit(slot_bytes)
        framing.send_frame(self._socket, message, message_id=self._message_id, deadline=until, limit_bytes=limit_bytes)
        while True:
            reply, message_id, fds = framing.receive_frame(self._socket, deadline=until)
            is_ours = message_id == self._message_id
            if is_ours and not isinstance(reply, messages.Progress):
                return reply, fds
            framing.close_fds(fds)
            if is_ours and on_progress is not None:
                until = min(deadline, time.monotonic() + self.silence_s)
                on_progress(reply)
            if time.monotonic() >= deadline:  # Progress alone is no answer
                raise TimeoutError

    def _check_usable(self) -> None:
        if os.getpid() != self._pid:
            self.close_in_child()
            raise UsageError(
                f"the connection to {self.socket_path} belongs to process {self._pid}; a forked child must not use it",
                reason="forked",
            )
        if self._is_closed:
            raise UnavailableError(
                f"the connection to the daemon at {self.socket_path} is closed; attach again", reason="closed"
            )

    def _unavailable(self, error: OSError, message: Any, waited_s: float) -> UnavailableError:
        request = type(message).__name__
        if isinstance(error, TimeoutError):
            return UnavailableError(
                f"daemon at {self.socket_path} was silent for {waited_s:.1f} s after {request}; "
                "the session is closed, attach again",
                reason="deadline",
            )
        return UnavailableError(
            f"daemon at {self.socket_path} is gone after {waited_s:.1f} s of {request} ({error}); attach again when it is back",
            reason="disconnected",
        )


def register_child_cleanup(callback: Callable[[], None]) -> Callable[[], None]:
    """Have ``callback`` run in every forked child (to close descriptors of slots there); returns what unregisters it.

    The callback must take no locks: whichever thread held them does not exist in the child.
    """
    _child_cleanups.append(callback)

    def unregister() -> None:
        with contextlib.suppress(ValueError):
            _child_cleanups.remove(callback)

    return unregister


def _drop_in_child() -> None:
    for connection in list(_connections):
        connection.close_in_child()
    for callback in _child_cleanups:
        with contextlib.suppress(OSError):
            callback()
    _child_cleanups.clear()  # a grandchild inherits none of it


os.register_at_fork(after_in_child=_drop_in_child)


def find_socket(given: str | os.PathLike[str] | None) -> str:
    """Path of the daemon's socket: as given, else ``$BACKSTAY_SOCKET``, else the default."""
    if given is not None and not isinstance(given, (str, os.PathLike)):
        raise UsageError(
            f"socket is a {type(given).__name__} ({given!r}): give the path of the daemon's Unix socket (its --socket)"
        )
    return os.fspath(given or os.environ.get(messages.SOCKET_VARIABLE) or messages.DEFAULT_SOCKET)


def _connect(socket_path: str, timeout_s: float) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # A blocking connect with the kernel's own timeout: with Python's, a full backlog is an error at once.
        micros = max(1, int(timeout_s * 1_000_000))
        sock.setsockopt(
            socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", micros // 1_000_000, micros % 1_000_000)
        )
        sock.connect(socket_path)
    except OSError as error:
        sock.close()
        if isinstance(error, (FileNotFoundError, ConnectionError)):
            raise UnavailableError(
                f"no daemon listens at {socket_path} ({error.strerror}): start `backstayd node` on this machine, or name its "
                f"--socket in {messages.SOCKET_VARIABLE}",
                reason="no_daemon",
            ) from error
        if isinstance(error, BlockingIOError):
            raise UnavailableError(
                f"the daemon at {socket_path} accepted no connection within {timeout_s:g} s", reason="deadline"
            ) from error
        raise ConfigError(
            f"cannot connect to the daemon's socket {socket_path}: {error.strerror or error}; "
            f"check the path (--socket of the daemon, {messages.SOCKET_VARIABLE} here) and its permissions",
            reason="bad_socket",
        ) from error
    return sock
