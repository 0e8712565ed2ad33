"""What the supervisor asks of a coder process, and what it hears back: frozen records, one JSON line each.

A job is stateless and idempotent: its inputs and outputs are files and peers named in it. A coder that dies is restarted
and the supervisor, being level-triggered, asks again.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from backstayd.core.records import Plan, Rebuild


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodeStripe:
    """Encode stripe ``stripe`` of ``plan`` (this node is its member ``stripe``): store the plan with all manifests of the
    group, read the k data blocks, keep parity 0 here, put parity 1..m-1 to their members. With m = 0: store the plan only."""

    plan: Plan
    stripe: int
    deadline_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchPlan:
    """Get a stored plan (with manifests) from any of ``addresses`` and store it here."""

    plan: Plan
    addresses: tuple[str, ...]
    deadline_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeStripe:
    """Do this node's task for ``stripe`` of ``rebuild``: read k fragments, decode all lost data blocks, put them to their owners."""

    rebuild: Rebuild
    stripe: int
    deadline_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchShard:
    """Copy a whole shard from the first of ``addresses`` that serves it verified, into staging, and leave it complete there."""

    run: str
    attempt: int
    step: int
    rank: int
    world_size: int
    size_bytes: int
    digest: str
    addresses: tuple[str, ...]
    deadline_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyShard:
    """Check every chunk of a shard on this node against its manifest (``is_staged``: the one in staging)."""

    run: str
    attempt: int
    step: int
    rank: int
    world_size: int
    digest: str
    is_staged: bool = False
    deadline_s: float = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyFragment:
    """Check every chunk of a parity fragment on this node against its record."""

    plan: Plan
    stripe: int
    index: int
    deadline_s: float = 600.0


Job = EncodeStripe | FetchPlan | DecodeStripe | FetchShard | VerifyShard | VerifyFragment


@dataclass(frozen=True, slots=True, kw_only=True)
class Corrupt:
    """A source that failed verification and must be quarantined where it lies."""

    node: str  # bulk address of the holder, "" = this node
    run: str
    attempt: int
    step: int
    rank: int = -1  # a shard, or
    world_size: int = 0
    digest: str = ""
    plan_id: str = ""  # a parity fragment
    stripe: int = -1
    index: int = -1
    detail: str = ""  # which chunk, expected and found crc


@dataclass(frozen=True, slots=True, kw_only=True)
class JobResult:
    """``error_class`` is "" on success, else a key of ``backstay.errors.ERROR_CLASSES``."""

    job_id: int
    error_class: str = ""
    reason: str = ""
    message: str = ""
    corrupt: tuple[Corrupt, ...] = ()
    done_bytes: int = 0
    seconds: dict[str, float] = field(default_factory=dict)  # where the time went: "read", "crc", "encode", "put", "write"
