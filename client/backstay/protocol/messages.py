"""The local protocol between a trainer and its node's daemon: message types, which are the contract of the local socket.

Their JSON form is their fields by name (:mod:`framing`). Shared by both sides; standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

from backstay.errors import BackstayError
from backstay.format import versions

PROTOCOL_VERSION: Final = versions.LOCAL_PROTOCOL
REQUEST_BYTES: Final = 4 * 1024 * 1024  # of one request to a daemon, beside what a granted slot adds
MAX_REQUEST_BYTES: Final = 64 * 1024 * 1024
DEFAULT_SOCKET: Final = "/run/backstay/backstayd.sock"
SOCKET_VARIABLE: Final = "BACKSTAY_SOCKET"  # overrides it


@dataclass(frozen=True, slots=True, kw_only=True)
class Attach:
    """First message of a connection. ``attempt`` is 0 before restore(), else this is a re-attach of a training rank."""

    protocol: int = PROTOCOL_VERSION
    run: str
    world_id: str
    rank: int
    world_size: int
    attempt: int = 0
    needs: tuple[int, ...] = ()
    model_signature: str = ""  # SHA-256 over tensor names, global shapes and dtypes; "" = not checked
    collective_timeout_s: float = 0.0
    client_version: str = ""
    layout: str = (
        ""  # SHA-256 over which boxes of which model tensors this rank holds; "" = any, whole shards are taken
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Attached:
    session_id: str
    incarnation: str
    lease_s: float
    protocol: int
    daemon_version: str = ""
    node: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Restore:
    """Ask for the world's decision. Answered by Progress messages and one Restored, Offer or Error.

    ``staged``: the decision of the last Offer, when everything this trainer needs of it was fetched.
    """

    allow_fresh: bool = False
    deadline_s: float = 600.0
    world_size: int = 0
    staged: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Open:
    """Visit a complete snapshot of any run of the same user, without a world; needs no Attach. Answered by Offer or Error.

    Fetch works as for a decision, as long as this connection is open; ``step`` 0 is the newest that can be read.
    """

    run: str
    step: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """The decided snapshot was written in another layout: its manifests, from which the trainer chooses chunks.

    The trainer answers with any number of Fetch requests and then Restore(staged=decision_id). A visit ends with its
    connection.
    """

    decision_id: str
    step: int
    base_attempt: int
    base_world_size: int
    snapshot_id: str
    manifests: tuple[dict[str, Any], ...]  # in rank order, each checked against its digest
    kinds: tuple[str, ...] = ()  # by rank: "local", "peer", "rebuild", "persisted"
    details: tuple[str, ...] = ()  # by rank: which nodes, or the url


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkRanges:
    """Chunks of the shard of ``rank``: ``firsts[i]`` and the ``counts[i] - 1`` that follow it; ascending, disjoint."""

    rank: int
    firsts: tuple[int, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetch:
    """Have chunks of the offered snapshot on this node; answered by Progress messages and one Fetched or Error.

    At most MAX_FDS shards in one request. An Error with reason ``decision_changed`` means: another snapshot or other
    sources are decided; send Restore without ``staged`` again, which is answered by a new Offer.
    """

    decision_id: str
    shards: tuple[ChunkRanges, ...]
    deadline_s: float = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchedShard:
    """A file of the shard's size and layout in which the fetched chunks lie (others may be holes), read-only."""

    rank: int
    fd_index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """All chunks are here and were verified as they came; a descriptor for each shard of the request."""

    shards: tuple[FetchedShard, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class GateEntry:
    """One statement on which ``ranks`` must agree: each of them makes it, with the same ``digest``, or the layout is wrong.

    ``name`` is its kind, a colon, and what it is about. ``ranks`` () means the whole world. A rank that names only itself
    claims something that no other rank may have.
    """

    name: str
    ranks: tuple[int, ...]
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GateDetail:
    """What is behind one entry: a digest per tensor (``names[i]`` has ``digests[i]``), bounded."""

    entry: str
    names: tuple[str, ...]
    digests: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """What this rank loaded, to be compared with the other ranks before the first step. ``failure``: it could not load.

    Answered by Progress messages and one GateAnswer or Error.
    """

    decision_id: str
    entries: tuple[GateEntry, ...] = ()
    details: tuple[GateDetail, ...] = ()
    failure: str = ""
    deadline_s: float = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GateAnswer:
    """``state``: "passed", "failed" (``message``), or "detail": send Gate again with details of ``entries``."""

    state: str
    entries: tuple[str, ...] = ()
    message: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Distrust:
    """What was restored led to NaN or infinity: it must not be restored again. Answered by Done."""

    step: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Persist:
    """Copy the newest protected snapshot to durable storage now (SIGTERM of the job). Answered by Done at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seal:
    """All files of ``step`` are written (file store): every rank commits its part. Answered by Done."""

    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AwaitSeal:
    """Wait up to ``wait_s`` until a step after ``after_step`` was sealed by some rank; answered by Sealed.

    ``complete_step``: what is waited for instead is that this step, or a later one of this world, is complete.
    """

    after_step: int
    wait_s: float = 0.0
    complete_step: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sealed:
    step: int = 0  # 0: none
    protected_step: int = 0
    complete_step: int = 0  # newest of the history that this world writes, the base included


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    phase: str  # "waiting", "staging", "recording"
    detail: str = ""
    done_bytes: int = 0
    total_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoredShard:
    """One staged, verified shard; its read-only descriptor is the one at ``fd_index`` of this frame."""

    rank: int
    source: str  # "local", "peer", "rebuild", "persisted"
    manifest: dict[str, Any]
    fd_index: int
    detail: str = ""  # which nodes


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    outcome: str  # EXACT, EXACT_OLDER, NONE
    attempt: int  # the history this world writes now
    step: int = 0
    base_attempt: int = 0
    snapshot_id: str = ""
    message: str = ""
    shards: tuple[RestoredShard, ...] = ()
    interval_steps: int = 1
    decision_id: str = ""
    base_world_size: int = 0
    probation_steps: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Reserve:
    """Ask for a slot of exactly ``size_bytes`` for ``step``; the daemon waits up to ``wait_s`` for one to come free.

    ``is_ahead``: the step is still to come, so that the slot is there before it.
    """

    step: int
    size_bytes: int
    wait_s: float = 0.0
    known_slots: tuple[str, ...] = ()  # slot ids whose descriptors the trainer still maps
    is_ahead: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Snapshot at multiples of ``interval_steps`` from ``from_step`` on; before that ``previous_interval_steps`` holds."""

    interval_steps: int = 1
    from_step: int = 0
    previous_interval_steps: int = 1

    def includes(self, step: int) -> bool:
        interval = self.interval_steps if step >= self.from_step else self.previous_interval_steps
        return step % max(1, interval) == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RunProgress:
    """The state of the run, in each answer about a slot. ``notice``: what keeps snapshots from becoming complete."""

    schedule: Schedule = field(default_factory=Schedule)
    redundancy: str = ""
    protected_step: int = 0
    notice: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reserved(RunProgress):
    """A slot to fill. ``slot_id`` names the inode; a descriptor comes along iff the id was not in ``known_slots``."""

    slot_id: str
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped(RunProgress):
    """No slot: this step is abandoned; training continues."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerCost:
    """What snapshots cost a trainer since it last reported: ``snapshot_s`` inside snapshot(), ``fence_s`` at the fence,
    ``waited_s`` of that waiting for a slot and for the copy, ``capture_s`` and ``copied_bytes`` of copying in the background;
    ``kept_bytes`` were unchanged and not copied."""

    snapshot_s: float = 0.0
    fence_s: float = 0.0
    capture_s: float = 0.0
    copied_bytes: int = 0
    kept_bytes: int = 0
    waited_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    step: int
    slot_id: str
    manifest: dict[str, Any]
    cost: TrainerCost = field(default_factory=TrainerCost)


@dataclass(frozen=True, slots=True, kw_only=True)
class Committed(RunProgress):
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Abandon:
    """The capture into this slot failed or was cancelled; answered by Done.

    ``is_short_of_slots``: because the slot came too late for the step to wait, which raises the interval as Skipped does.
    ``is_unused``: nothing was captured into it; it had been reserved ahead for a step that was not to come.
    """

    step: int
    slot_id: str = ""
    reason: str = ""
    is_short_of_slots: bool = False
    cost: TrainerCost = field(default_factory=TrainerCost)
    is_unused: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Finish:
    """The run ended well: its memory is freed everywhere; answered by Done."""

    keep: bool = False  # True: detach only, memory stays until job_ttl_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """Ask what the daemon knows of itself and its runs; answered by StatusBody. Needs no Attach."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusBody:
    document: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Error:
    """``error_class`` is a key of ``backstay.errors.ERROR_CLASSES``."""

    error_class: str
    reason: str
    message: str

    @classmethod
    def of(cls, error: BackstayError) -> Error:
        return cls(error_class=type(error).__name__, reason=error.reason, message=str(error))


MESSAGES: Final[dict[str, type[Any]]] = {
    cls.__name__: cls
    for cls in (
        Attach, Attached, Restore, Progress, Restored, Open, Offer, Fetch, Fetched, Gate, GateAnswer, Distrust, Persist, Seal,
        AwaitSeal, Sealed, Reserve, Reserved, Skipped, Commit, Committed,
        Abandon, Finish, Status, StatusBody, Done, Error,
    )
}  # fmt: skip


def request_limit(slot_bytes: int) -> int:
    """Longest request that a daemon takes of a trainer to which it granted a slot of ``slot_bytes``: a manifest grows with
    the chunks of its shard (1/32768 of the bytes) and with its tensors, and no other message is long."""
    return min(MAX_REQUEST_BYTES, REQUEST_BYTES + slot_bytes // 128)
