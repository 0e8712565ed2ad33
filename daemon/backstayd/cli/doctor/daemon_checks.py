"""Checks of the running daemons for `backstay doctor`: socket, coordinator, clocks and timeouts. Reads only."""

from __future__ import annotations

import socket
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from backstay.errors import BackstayError
from backstay.protocol import framing, messages
from backstayd.cli.doctor.findings import Finding, fail, ok, warn

_CREDENTIALS: Final = struct.Struct("3i")  # pid, uid, gid of SO_PEERCRED


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The daemon's answer on the socket. ``document`` and ``pid`` are None when there was none."""

    finding: Finding
    document: dict[str, Any] | None = None
    pid: int | None = None


def ask_daemon(path: Path, *, timeout_s: float) -> Answer:
    """Ask the daemon on ``path`` for its status, with at most ``timeout_s`` per read."""
    subject = "daemon socket"
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(timeout_s)
            connection.connect(str(path))
            raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            pid = _CREDENTIALS.unpack(raw)[0]
            framing.send_frame(connection, messages.Status(), message_id=1)
            reply, _, _ = framing.receive_frame(connection)
    except FileNotFoundError:
        return Answer(finding=fail(subject, f"{path} does not exist; is `backstayd node` running with this --socket?"))
    except PermissionError:
        return Answer(finding=fail(subject, f"this user may not open {path}, and neither may trainers of this user"))
    except ConnectionRefusedError:
        return Answer(
            finding=fail(subject, f"nobody listens on {path}, a leftover of a dead daemon; start the daemon again")
        )
    except TimeoutError:
        return Answer(
            finding=fail(
                subject, f"{path}: connected, but no answer within {timeout_s:g} s; the daemon hangs or is stopped"
            )
        )
    except (OSError, BackstayError) as error:
        return Answer(finding=fail(subject, f"{path}: {error}"))
    if not isinstance(reply, messages.StatusBody):
        return Answer(finding=fail(subject, f"{path} answered {type(reply).__name__}, not a status"), pid=pid)
    document = reply.document
    node = document.get("node", {})
    text = f"{path}: node {node.get('name', '?')}, pid {pid}, version {node.get('version') or '?'}"
    return Answer(finding=ok(subject, text), document=document, pid=pid)


def check_link(document: dict[str, Any]) -> Finding:
    """Whether the node is connected to its coordinator."""
    link = document.get("coordinator", {})
    if link.get("is_connected"):
        return ok("daemon's coordinator", f"connected to {link.get('address')}")
    return fail(
        "daemon's coordinator",
        f"not connected to {link.get('addresses')}: nothing is protected and no restore is decided"
        + (f" ({link['error']})" if link.get("error") else ""),
    )


def check_clock(document: dict[str, Any], *, asked_unix_s: float, lease_s: float) -> Finding:
    """The coordinator's clock compared with this machine's; nothing is ordered by clocks, but people read timelines."""
    now = time.time()
    offset = document["time_unix_s"] - (asked_unix_s + now) / 2
    text = f"{offset:+.3f} s from the coordinator's (the call took {now - asked_unix_s:.3f} s)"
    if abs(offset) - (now - asked_unix_s) / 2 > lease_s:
        return warn("clock", f"{text}: timelines of different nodes will not line up; nothing else depends on clocks")
    return ok("clock", text)


def check_collective_timeout(timeout_s: float, *, lease_s: float, restore_deadline_s: float, source: str) -> Finding:
    """The trainer's collective timeout against the lease and the deadline of restore().

    A rank that is still restoring makes the others wait in their first collective, so that wait must be allowed to be as
    long as a restore may take. A lost node is noticed after a lease; with a timeout below two, a pause restarts a run.
    """
    subject = "collective timeout"
    text = f"{timeout_s:g} s ({source}); lease {lease_s:g} s, restore deadline {restore_deadline_s:g} s"
    if timeout_s < 2 * lease_s:
        return fail(subject, f"{text}: below two leases, so a short pause restarts the run before backstay notices it")
    if timeout_s < restore_deadline_s:
        return warn(subject, f"{text}: ranks that restore first give up waiting for a slower one after that time")
    return ok(subject, text)


def session_timeouts(document: dict[str, Any]) -> list[float]:
    """Collective timeouts that attached trainers declared, where the daemon shows them."""
    return [
        float(session["collective_timeout_s"])
        for run in document.get("runs", [])
        for session in run.get("sessions", [])
        if session.get("collective_timeout_s")
    ]
