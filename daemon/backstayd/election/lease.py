"""The lease record of the election, the interface of its store, and the times derived from one lease.

Contains no election logic. Nothing here or in a store is compared with a clock of another machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

RENEW_SHARE: Final = 2 / 3  # a leader leads for this part of a lease after it requested its last renewal
RETRY_SHARE: Final = 1 / 6  # and renews this often, so that at least two renewals may fail before it stops
POLL_SHARE: Final = 1 / 10  # standbys read this often


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseRecord:
    """Who leads. ``term`` grows with every new leader; a released record has ``holder`` "", and anyone may take it at once.

    ``lease_s`` is the holder's: others wait for the longer of theirs and this one, so that differing settings are safe.
    """

    holder: str
    address: str
    term: int
    lease_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Versioned:
    """A record in the store. ``version`` is opaque and changes with every write, even of an identical record."""

    record: LeaseRecord
    version: str


class LeaseStore(Protocol):
    """One small record with linearizable reads and compare-and-swap; blocking, from any thread, with own deadlines."""

    @property
    def name(self) -> str:
        """Where the record is, as text."""

    def read(self) -> Versioned | None:
        """The record, or None if there is none yet.

        Raises:
            UnavailableError: no answer in time. ConfigError: rejected, which an operator must fix.
        """

    def compare_and_swap(self, record: LeaseRecord, version: str | None) -> str | None:
        """Write ``record`` if the stored one still has ``version`` (None: if there is none); the new version, else None.

        Raises:
            UnavailableError: no answer in time; the write may have happened, or still happen. ConfigError: rejected.
        """

    def close(self) -> None:
        """Close connections; idempotent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """The times derived from one lease.

    There are never two leaders at once as long as the clocks of any two machines run at rates that differ by less than
    lease / renew deadline, which is 1.5.
    """

    lease_s: float

    @property
    def renew_deadline_s(self) -> float:
        """A leader stops leading this long after it sent the last renewal that succeeded."""
        return self.lease_s * RENEW_SHARE

    @property
    def retry_s(self) -> float:
        """Between two renewals, or attempts of one."""
        return self.lease_s * RETRY_SHARE

    @property
    def poll_s(self) -> float:
        """Between two reads of a candidate that does not lead."""
        return self.lease_s * POLL_SHARE

    @property
    def call_timeout_s(self) -> float:
        """Longest duration of one call to the store."""
        return self.lease_s * RETRY_SHARE
