"""One candidate of the election as a state machine: what the store answered and the time in, what to do out.

Pure: it calls nothing and reads no clock. Times are of one clock of this machine that never goes back and does not stand
still while the machine sleeps; they are never sent to anybody nor compared with a time of another machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

from backstayd.election.lease import LeaseRecord, Timing, Versioned

NOBODY: Final = "nobody"  # never renews


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """Ask the store for the record."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Swap:
    """Ask the store to replace what has ``version`` by ``record``."""

    record: LeaseRecord
    version: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Lead:
    """Begin to act, in a reign of this number: no other candidate acts, and none of an older reign is to be obeyed."""

    term: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDown:
    """Stop acting, at once."""

    reason: str


Action = Read | Swap | Lead | StepDown


class _Asked(Enum):
    NOTHING = "nothing"
    READ = "read"
    TAKE = "take"
    MAKE = "make"  # a record of nobody
    RENEW = "renew"
    RELEASE = "release"


class Elector:
    """Drive it with :meth:`tick` and the store's answers; carry out what each returns, in order.

    Invariants:
        It acts only until the renew deadline after it *asked for* the last write that the store confirmed.
        It replaces another's record only after it has seen it unchanged for a whole lease, or given back. Where there is
        none, one of nobody is written first and waited for likewise: it may have been deleted under a leader.
        At most one question to the store is open.

    Args:
        holder: Who we are: another one after every start of the process.
        address: Where others reach us.
    """

    def __init__(self, holder: str, address: str, timing: Timing) -> None:
        self.holder, self.address = holder, address
        self._timing = timing
        self._seen: Versioned | None = None
        self._seen_since_s: float | None = None  # when the version of ``_seen`` was first seen; None: never looked
        self._highest_term = 0
        self._is_known = (
            False  # ``_seen`` is what the store last said, with no write of ours since that may have happened
        )
        self._asked = _Asked.NOTHING
        self._asked_s = 0.0
        self._proposed: LeaseRecord | None = None
        self._due_s = 0.0
        self._leads_until_s: float | None = None
        self._is_stopping = False
        self._stands_back_until_s = 0.0
        self.is_finished = False  # after :meth:`stop`: nothing is left to be given back
        self.last_error = ""

    def may_act(self, now_s: float) -> bool:
        """Whether this candidate leads at ``now_s``; ask before everything that leaves."""
        return self._leads_until_s is not None and now_s < self._leads_until_s

    def margin_s(self, now_s: float) -> float:
        """How long it may act without another renewal; 0 if it does not lead."""
        return max(0.0, self._leads_until_s - now_s) if self._leads_until_s is not None else 0.0

    @property
    def is_leading(self) -> bool:
        """Whether it was told to lead and not yet to step down."""
        return self._leads_until_s is not None

    def leader(self, now_s: float) -> LeaseRecord | None:
        """Whom the record names; None if nobody, or one that has not renewed for so long that it acts no more."""
        if self._seen is None or self._seen_since_s is None or self._seen.record.holder in ("", NOBODY):
            return None
        return self._seen.record if now_s - self._seen_since_s < self._timing.renew_deadline_s else None

    def wake_s(self, now_s: float) -> float:
        """When :meth:`tick` is wanted next."""
        due_s = self._due_s if self._asked is _Asked.NOTHING else now_s + self._timing.lease_s
        return due_s if self._leads_until_s is None else min(due_s, self._leads_until_s)

    def tick(self, now_s: float) -> list[Action]:
        """Let time pass."""
        actions = self._step_down_if_late(now_s)
        if self._asked is _Asked.NOTHING and now_s >= self._due_s and not self.is_finished:
            actions += self._ask(now_s)
        return actions

    def stop(self, now_s: float) -> list[Action]:
        """Give back what is held, so that another takes over at once; ask until :attr:`is_finished`."""
        actions: list[Action] = []
        if not self._is_stopping:
            self._is_stopping = True
            actions += self._step_down("this coordinator ends")
            self._due_s = now_s
            self.is_finished = self._asked is _Asked.NOTHING and not self._is_ours
        return actions + self.tick(now_s)

    def resign(self, reason: str, now_s: float) -> list[Action]:
        """Stop acting, give the lease back and leave it to others for one lease; then compete again."""
        actions = self._step_down(reason)
        if actions:
            self._stands_back_until_s, self._due_s = now_s + self._timing.lease_s, now_s
        return actions + self.tick(now_s)

    def on_read(self, found: Versioned | None, now_s: float) -> list[Action]:
        """The store's answer to Read."""
        self._asked, self.last_error = _Asked.NOTHING, ""
        version = found.version if found is not None else None
        if self._seen_since_s is None or version != self._version:
            self._seen_since_s = now_s
        self._note(found)
        actions = self._step_down_if_late(now_s)
        if self.is_leading and not self._is_ours:
            actions += self._step_down(f"another leads: {_words(found)}")
        self._due_s = now_s + self._timing.poll_s
        if self._is_stopping:
            self._due_s = now_s
            self.is_finished = not self._is_ours
        elif self.is_leading or found is None or self._may_take(now_s):
            actions += self._ask(now_s)
        return actions

    def on_swapped(self, version: str | None, now_s: float) -> list[Action]:
        """The store's answer to Swap: the new version, or None if the record had changed."""
        asked, self._asked, self.last_error = self._asked, _Asked.NOTHING, ""
        actions = self._step_down_if_late(now_s)
        if version is None or self._proposed is None:
            self._is_known, self._due_s = False, now_s
            return actions
        self._note(Versioned(record=self._proposed, version=version))
        self._seen_since_s, self._due_s = now_s, now_s + self._timing.retry_s
        if asked is _Asked.RELEASE:
            self.is_finished = self._is_stopping
        elif self._is_stopping:
            self._due_s = now_s
        elif asked is _Asked.RENEW and self.is_leading:
            self._leads_until_s = self._asked_s + self._timing.renew_deadline_s
        elif asked is _Asked.TAKE:
            actions += self._begin(now_s)
        return actions

    def on_failed(self, reason: str, now_s: float) -> list[Action]:
        """No answer to Read or Swap: the write may have happened, or happen yet."""
        asked, self._asked, self.last_error = self._asked, _Asked.NOTHING, reason
        self._is_known = False
        self._due_s = now_s + self._timing.poll_s
        if self._is_stopping and asked is _Asked.RELEASE:
            self.is_finished = True  # others wait a lease instead
        return self._step_down_if_late(now_s)

    @property
    def _is_ours(self) -> bool:
        return self._seen is not None and self._seen.record.holder == self.holder

    @property
    def _version(self) -> str | None:
        return self._seen.version if self._seen is not None else None

    def _note(self, found: Versioned | None) -> None:
        self._seen, self._is_known = found, True
        if found is not None:
            self._highest_term = max(self._highest_term, found.record.term)

    def _may_take(self, now_s: float) -> bool:
        if self._seen is None or self._seen_since_s is None or now_s < self._stands_back_until_s:
            return False
        is_free = self._seen.record.holder in ("", self.holder)
        lease_s = max(self._timing.lease_s, self._seen.record.lease_s)
        return is_free or now_s - self._seen_since_s >= lease_s

    def _ask(self, now_s: float) -> list[Action]:
        """The next question to the store."""
        self._asked_s = now_s
        if not self._is_known:
            self._asked = _Asked.READ
            return [Read()]
        term = self._highest_term
        if self._is_stopping and not self._is_ours:
            self.is_finished = True
            return []
        if self._is_ours and (self._is_stopping or now_s < self._stands_back_until_s):
            return [self._swap(_Asked.RELEASE, self._record("", term))]
        if self.is_leading:
            return [self._swap(_Asked.RENEW, self._record(self.holder, term))]
        if self._seen is None:
            return [self._swap(_Asked.MAKE, self._record(NOBODY, term))]
        if self._may_take(now_s):
            return [self._swap(_Asked.TAKE, self._record(self.holder, term + 1))]
        self._asked = _Asked.READ
        return [Read()]

    def _record(self, holder: str, term: int) -> LeaseRecord:
        address = self.address if holder == self.holder else ""
        return LeaseRecord(holder=holder, address=address, term=term, lease_s=self._timing.lease_s)

    def _swap(self, asked: _Asked, record: LeaseRecord) -> Swap:
        self._asked, self._proposed = asked, record
        return Swap(record=record, version=self._version)

    def _begin(self, now_s: float) -> list[Action]:
        assert self._proposed is not None
        until_s = self._asked_s + self._timing.renew_deadline_s
        if now_s >= until_s:
            self._due_s = now_s  # the answer was so late that nothing is left of it: take it anew
            return []
        self._leads_until_s = until_s
        return [Lead(term=self._proposed.term)]

    def _step_down_if_late(self, now_s: float) -> list[Action]:
        if self._leads_until_s is None or now_s < self._leads_until_s:
            return []
        why = f": {self.last_error}" if self.last_error else ""
        return self._step_down(f"not renewed within {self._timing.renew_deadline_s:g} s{why}")

    def _step_down(self, reason: str) -> list[Action]:
        if self._leads_until_s is None:
            return []
        self._leads_until_s = None
        return [StepDown(reason=reason)]


def _words(found: Versioned | None) -> str:
    if found is None:
        return "the record is gone"
    return f"{found.record.address or 'nobody'} (term {found.record.term})"
