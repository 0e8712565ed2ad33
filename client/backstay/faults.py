"""Named fault points: places where a test can make this very process die, addressed by logical position.

``BACKSTAY_FAULTS`` holds entries ``point[,key=value...]:action`` separated by ``;``, for example
``mid_copy,rank=3,step=12:kill`` or ``before_publish,once=/tmp/x:kill``. Keys must equal those the point is reached with
(compared as text); ``nth=K`` fires at the K-th matching reach in this process; ``once=PATH`` fires, from then
on, only for who creates PATH: a fault is armed later by deleting a PATH that was there.
Actions: ``kill`` (SIGKILL to itself), ``killgroup`` (SIGKILL to its process group), ``stop`` (SIGSTOP), ``exit``
(status 1), ``hang`` (this thread blocks forever; the others continue). Unset, a point costs one dictionary look-up. Standard
library only.
"""

from __future__ import annotations

import os
import signal
import threading
from dataclasses import dataclass, field

from backstay.errors import ConfigError

POINTS = (
    "after_slot", "mid_copy", "before_commit", "after_commit",  # trainer
    "before_publish", "after_publish", "mid_release",  # node daemon
    "mid_encode", "mid_forward", "mid_rebuild", "mid_fetch",  # coder
    "mid_upload", "after_upload", "before_record", "after_record", "mid_prune", "mid_fetch_persisted",  # coder
    "decided", "recorded_on_some",  # coordinator
    "pulse",  # the event loop of node daemon and coordinator, every other second
)  # fmt: skip
ACTIONS = ("kill", "killgroup", "stop", "exit", "hang")


@dataclass(slots=True)
class _Fault:
    point: str
    action: str
    match: dict[str, str]
    nth: int = 1
    once: str = ""
    seen: int = field(default=0)


def _parse(text: str) -> dict[str, list[_Fault]]:
    faults: dict[str, list[_Fault]] = {}
    for entry in filter(None, (part.strip() for part in text.split(";"))):
        where, _, action = entry.rpartition(":")
        point, *pairs = where.split(",")
        match = dict(pair.partition("=")[::2] for pair in pairs)
        nth, once = match.pop("nth", "1"), match.pop("once", "")
        is_whole = all("=" in pair for pair in pairs) and nth.isdecimal() and int(nth) > 0
        if point not in POINTS or action not in ACTIONS or not is_whole:
            raise ConfigError(
                f"BACKSTAY_FAULTS: {entry!r} is not POINT[,key=value]:ACTION with a known point and action, nth from 1"
            )
        fault = _Fault(point, action, match, int(nth), once)
        faults.setdefault(point, []).append(fault)
    return faults


_faults = _parse(os.environ.get("BACKSTAY_FAULTS", ""))


def is_set(point: str) -> bool:
    """Whether a fault is armed at ``point``; for callers whose arguments to :func:`reach` are expensive."""
    return point in _faults


def reach(point: str, **where: object) -> None:
    """Mark that ``point`` was reached at the logical position ``where``; may not return."""
    for fault in _faults.get(point, ()):
        if all(str(where.get(key)) == value for key, value in fault.match.items()):
            fault.seen += 1
            if (fault.seen == fault.nth or (fault.once and fault.seen > fault.nth)) and _claim(fault.once):
                _act(fault.action)


def _claim(path: str) -> bool:
    if not path:
        return True
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except FileExistsError:
        return False
    return True


def _act(action: str) -> None:
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "killgroup":
        os.killpg(os.getpgid(0), signal.SIGKILL)
    elif action == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif action == "hang":
        threading.Event().wait()
    else:
        os._exit(1)
