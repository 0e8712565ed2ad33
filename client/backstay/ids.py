"""Names and identities, as frozen values shared by both sides.

Five names order events (docs/glossary.md): attempt, snapshot id, plan id, incarnation, generation. Nothing else does.
Standard library only.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from backstay.errors import UsageError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}\Z")
DEFAULT_JOB = "default"
# Steps, attempts and sizes lie below: sums and products of them still fit the wire's 64 bits.
MAX_COUNT: Final = 1 << 48
MAX_GENERATION: Final = 1 << 62  # room for every term of an election (32 bits) and for counting on from there
MAX_WORLD_SIZE: Final = 1 << 20


def check_name(kind: str, name: Any) -> str:
    """Return ``name`` if it is safe as one path component, else raise UsageError."""
    if not isinstance(name, str) or not _NAME.match(name):
        raise UsageError(
            f"{kind} {name!r} is not usable: 1 to 100 letters, digits, '.', '_' or '-', starting with a letter or digit",
            reason="bad_name",
        )
    return name


@dataclass(frozen=True, slots=True, order=True)
class RunKey:
    """A job and its run_id; written ``job/run_id`` on every wire and in every record (field ``run``)."""

    job: str
    run_id: str

    def __post_init__(self) -> None:
        check_name("job", self.job)
        check_name("run_id", self.run_id)

    def __str__(self) -> str:
        return f"{self.job}/{self.run_id}"

    @classmethod
    def parse(cls, text: str) -> RunKey:
        """Raises UsageError unless ``text`` is ``job/run_id``."""
        job, slash, run_id = text.partition("/")
        if not slash:
            raise UsageError(
                f"{text!r:.120} names no run_id: write JOB/RUN_ID, such as {DEFAULT_JOB}/{text:.100}", reason="bad_name"
            )
        return cls(job, run_id)


@dataclass(frozen=True, slots=True, order=True)
class Generation:
    """Fences grants, releases and decisions: a higher number wins; the same number of another coordinator is refused."""

    number: int = 0
    incarnation: str = ""

    def admits(self, other: Generation) -> bool:
        """Whether a holder of ``self`` (the highest seen) may obey ``other``."""
        return other.number > self.number or other == self

    @property
    def is_possible(self) -> bool:
        """Whether numbers can be counted on from here; a flipped bit or a stranger makes one where they cannot."""
        return 0 <= self.number < MAX_GENERATION


@dataclass(frozen=True, slots=True, order=True)
class SnapshotKey:
    """Order of histories within a run. Not an identity of bytes: that is the snapshot id."""

    attempt: int
    step: int


def new_incarnation() -> str:
    """A name for one start of a daemon, a coordinator or a world: 16 hex digits."""
    return secrets.token_hex(8)


def snapshot_id(*, key: SnapshotKey, world_size: int, shard_digests: Sequence[str]) -> str:
    """SHA-256 over attempt, step, world size and all manifest digests in rank order; 64 hex digits."""
    if len(shard_digests) != world_size:
        raise UsageError(f"snapshot of world size {world_size} needs {world_size} digests, got {len(shard_digests)}")
    text = f"{key.attempt}\n{key.step}\n{world_size}\n" + "\n".join(shard_digests)
    return hashlib.sha256(text.encode()).hexdigest()
