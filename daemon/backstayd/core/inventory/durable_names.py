"""Names on durable storage: URLs of runs and snapshots, names of the files in them. Pure.

``<persist_url>/<job>/<run_id>/attempt-0003/step-00001200/rank-00003-of-00008.safetensors`` and ``.manifest.json``, with
``snapshot.json`` written last: a directory without it holds no snapshot. ``distrusted/`` beside the attempts holds a mark for
each snapshot that is not restored again, whether it lies there or not: what was trained from it may.
"""

from __future__ import annotations

import re
from typing import Final

from backstay.ids import RunKey, SnapshotKey

RECORD_NAME: Final = "snapshot.json"
MARKS_NAME: Final = "distrusted"

_ATTEMPT = re.compile(r"attempt-(\d{4,18})\Z")
_MARK = re.compile(r"attempt-(\d{4,18})\.step-(\d{8,18})\.([0-9a-f]{64})\.json\Z")
_SNAPSHOT_ID = re.compile(r"[0-9a-f]{64}\Z")
_STEP = re.compile(r"step-(\d{8,18})\Z")


def run_url(persist_url: str, run: str) -> str:
    """The directory of a run below the operator's URL."""
    RunKey.parse(run)
    return f"{persist_url.rstrip('/')}/{run}"


def root_of(run_url: str) -> str:
    """The operator's URL of a run's directory: what must be there before anything is written."""
    return run_url.rstrip("/").rsplit("/", 2)[0]


def is_local(url: str) -> bool:
    """Whether files below ``url`` are on a file system of the machine that reads them."""
    return url != "" and ("://" not in url or url.startswith("file://"))


def snapshot_name(key: SnapshotKey) -> str:
    """The directory of a snapshot below its run's."""
    return f"attempt-{key.attempt:04d}/step-{key.step:08d}"


def snapshot_url(run_url: str, key: SnapshotKey) -> str:
    return f"{run_url}/{snapshot_name(key)}"


def attempt_of(name: str) -> int | None:
    match = _ATTEMPT.match(name)
    return int(match[1]) if match else None


def step_of(name: str) -> int | None:
    match = _STEP.match(name)
    return int(match[1]) if match else None


def shard_name(rank: int, world_size: int) -> str:
    return f"rank-{rank:05d}-of-{world_size:05d}.safetensors"


def manifest_name(rank: int, world_size: int) -> str:
    return f"rank-{rank:05d}-of-{world_size:05d}.manifest.json"


def is_markable(snapshot_id: str) -> bool:
    """Whether a mark can carry it: what nodes report may be anything."""
    return _SNAPSHOT_ID.match(snapshot_id) is not None


def mark_name(key: SnapshotKey, snapshot_id: str) -> str:
    """The mark of a distrusted snapshot, below its run's directory; its name says all that matters."""
    return f"{MARKS_NAME}/attempt-{key.attempt:04d}.step-{key.step:08d}.{snapshot_id}.json"


def mark_of(name: str) -> tuple[SnapshotKey, str] | None:
    """Place and snapshot id of the mark with that name in its directory."""
    match = _MARK.match(name)
    return (SnapshotKey(int(match[1]), int(match[2])), match[3]) if match else None
