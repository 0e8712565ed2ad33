"""One candidate of the election as a state machine: store answers and times in, actions out.

Pure: it calls nothing and reads no clock. Times come from one clock of this machine that never goes backwards and includes
time asleep; they are never sent or compared with times of another machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

from backstayd.election.lease import LeaseRecord, Timing, Versioned

NOBODY: Final = "nobody"  # a holder that never renews


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """Read the record from the store."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Swap:
    """Replace the record of ``version`` with ``record``."""

    record: LeaseRecord
    version: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Lead:
    """Begin to lead in this term: no other candidate leads, and leaders of older terms must not be obeyed."""

    term: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDown:
    """Stop leading at once."""

    reason: str


Action = Read | Swap | Lead | StepDown


class _Asked(Enum):
    NOTHING = "nothing"
    READ = "read"
    TAKE = "take"
    MAKE = "make"  # a record held by nobody
    RENEW = "renew"
    RELEASE = "release"


class Elector:
    """Drive it with :meth:`tick` and the store's answers; carry out the returned actions in order.

    Invariants:
        It leads only until the renew deadline after it *requested* the last write that the store confirmed.
        It replaces another's record only after seeing it unchanged for a whole lease, or released. Where there is
        none, it first writes one held by nobody and waits likewise: the record may have been deleted under a leader.
        At most one request to the store is pending.

    Args:
        holder: Our unique name, a new one for every start of the process.
        address: Where peers reach us.
    """

    def __init__(self, holder: str, address: str, timing: Timing) -> None:
        self.holder, self.address = holder, address
        self._timing = timing
        self._seen: Versioned | None = None
        self._seen_since_s: float | None = None  # when the version of ``_seen`` was first seen; None: never read
        self._highest_term = 0
        self._is_known = False  # ``_seen`` is the store's last answer, and no write of ours may have changed it since
        self._asked = _Asked.NOTHING
        self._asked_s = 0.0
        self._proposed: LeaseRecord | None = None
        self._due_s = 0.0
        self._leads_until_s: float | None = None
        self._is_stopping = False
        self._resigned_until_s = 0.0
        self.is_finished = False  # after :meth:`stop`: nothing is left to release
        self.last_error = ""

    def may_act(self, now_s: float) -> bool:
        """Whether this candidate leads at ``now_s``; check before sending anything."""
        return self._leads_until_s is not None and now_s < self._leads_until_s

    def margin_s(self, now_s: float) -> float:
        """How long it may lead without another renewal; 0 if it does not lead."""
        return max(0.0, self._leads_until_s - now_s) if self._leads_until_s is not None else 0.0

    @property
    def is_leading(self) -> bool:
        """Whether it has emitted Lead and not yet StepDown."""
        return self._leads_until_s is not None

    def leader(self, now_s: float) -> LeaseRecord | None:
        """The holder in the record; None if nobody, or one that has not renewed within the renew deadline."""
        if self._seen is None or self._seen_since_s is None or self._seen.record.holder in ("", NOBODY):
            return None
        return self._seen.record if now_s - self._seen_since_s < self._timing.renew_deadline_s else None

    def wake_s(self, now_s: float) -> float:
        """When to call :meth:`tick` next."""
        due_s = self._due_s if self._asked is _Asked.NOTHING else now_s + self._timing.lease_s
        return due_s if self._leads_until_s is None else min(due_s, self._leads_until_s)

    def tick(self, now_s: float) -> list[Action]:
        """Let time pass."""
        actions = self._step_down_if_late(now_s)
        if self._asked is _Asked.NOTHING and now_s >= self._due_s and not self.is_finished:
            actions += self._ask(now_s)
        return actions

    def stop(self, now_s: float) -> list[Action]:
        """Release the lease so that another takes over at once; keep ticking until :attr:`is_finished`."""
        actions: list[Action] = []
        if not self._is_stopping:
            self._is_stopping = True
            actions += self._step_down("this coordinator is stopping")
            self._due_s = now_s
            self.is_finished = self._asked is _Asked.NOTHING and not self._is_ours
        return actions + self.tick(now_s)

    def resign(self, reason: str, now_s: float) -> list[Action]:
        """Stop leading, release the lease and let others lead for one lease; then compete again."""
        actions = self._step_down(reason)
        if actions:
            self._resigned_until_s, self._due_s = now_s + self._timing.lease_s, now_s
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
            actions += self._step_down(f"another coordinator leads: {_described(found)}")
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
        """No answer to Read or Swap: the write may have happened, or still happen."""
        asked, self._asked, self.last_error = self._asked, _Asked.NOTHING, reason
        self._is_known = False
        self._due_s = now_s + self._timing.poll_s
        if self._is_stopping and asked is _Asked.RELEASE:
            self.is_finished = True  # the others wait one lease instead
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
        if self._seen is None or self._seen_since_s is None or now_s < self._resigned_until_s:
            return False
        is_free = self._seen.record.holder in ("", self.holder)
        lease_s = max(self._timing.lease_s, self._seen.record.lease_s)
        return is_free or now_s - self._seen_since_s >= lease_s

    def _ask(self, now_s: float) -> list[Action]:
        """The next request to the store."""
        self._asked_s = now_s
        if not self._is_known:
            self._asked = _Asked.READ
            return [Read()]
        term = self._highest_term
        if self._is_stopping and not self._is_ours:
            self.is_finished = True
            return []
        if self._is_ours and (self._is_stopping or now_s < self._resigned_until_s):
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
            self._due_s = now_s  # the answer came after the renew deadline: take the lease again
            return []
        self._leads_until_s = until_s
        return [Lead(term=self._proposed.term)]

    def _step_down_if_late(self, now_s: float) -> list[Action]:
        if self._leads_until_s is None or now_s < self._leads_until_s:
            return []
        why = f": {self.last_error}" if self.last_error else ""
        return self._step_down(f"the lease was not renewed within {self._timing.renew_deadline_s:g} s{why}")

    def _step_down(self, reason: str) -> list[Action]:
        if self._leads_until_s is None:
            return []
        self._leads_until_s = None
        return [StepDown(reason=reason)]


def _described(found: Versioned | None) -> str:
    if found is None:
        return "the record was deleted"
    return f"{found.record.address or 'nobody'} (term {found.record.term})"
