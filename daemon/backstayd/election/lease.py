"""The record that coordinators agree by, the place it is kept in, and the times that follow from one lease.

Holds no logic of the election. Nothing here or in a store is compared with a clock of another machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

RENEW_SHARE: Final = 2 / 3  # a leader acts for this part of a lease after it asked for its last renewal
RETRY_SHARE: Final = 1 / 6  # and renews this often, so that at least two may fail before it stops
POLL_SHARE: Final = 1 / 10  # others look this often


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseRecord:
    """Who leads. ``term`` grows with every reign; ``holder`` "" was given back, and anybody may take it at once.

    ``lease_s`` is the holder's: others wait for the longer of theirs and this one, so that a setting that differs is safe.
    """

    holder: str
    address: str
    term: int
    lease_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Versioned:
    """A record as the store has it. ``version`` is opaque and another after every write, also one of the same record."""

    record: LeaseRecord
    version: str


class LeaseStore(Protocol):
    """One small record with linearizable reads and compare-and-swap; blocking, from any thread, with own deadlines."""

    @property
    def name(self) -> str:
        """Where the record is, for people."""

    def read(self) -> Versioned | None:
        """The record, or None if there is none yet.

        Raises:
            UnavailableError: no answer in time. ConfigError: refused, which an operator must change.
        """

    def compare_and_swap(self, record: LeaseRecord, version: str | None) -> str | None:
        """Write ``record`` if the stored one still has ``version`` (None: if there is none); the new version, else None.

        Raises:
            UnavailableError: no answer in time; the write may have happened, or happen yet. ConfigError: refused.
        """

    def close(self) -> None:
        """Close connections; harmless when repeated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """What follows from one lease.

    Two leaders never act at once as long as the clocks of any two machines run at rates that differ by less than
    lease / renew deadline, which is 1.5.
    """

    lease_s: float

    @property
    def renew_deadline_s(self) -> float:
        """A leader stops acting this long after it sent the last renewal that succeeded."""
        return self.lease_s * RENEW_SHARE

    @property
    def retry_s(self) -> float:
        """Between two renewals, or tries of one."""
        return self.lease_s * RETRY_SHARE

    @property
    def poll_s(self) -> float:
        """Between two looks of one that does not lead."""
        return self.lease_s * POLL_SHARE

    @property
    def call_timeout_s(self) -> float:
        """Longest wait for the store in one call."""
        return self.lease_s * RETRY_SHARE
