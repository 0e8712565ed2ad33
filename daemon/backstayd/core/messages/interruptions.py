"""What a run's ledger is written in: one interruption, and all of them as every host keeps them in its recorded decision.

Times are Unix seconds of the coordinator's clock; 0 means not known. Pure; must not reckon (``ledger.py`` does).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Interruption:
    """One end of a world that trained, and how the next world came to train.

    ``cause`` is ``trainer_died``, ``node_lost``, ``all_nodes_lost``, ``distrusted`` or ``world_restarted``. Times ascend as
    far as they are known: heard, noticed, opened, decided, released.
    """

    attempt: int  # the history that ended
    cause: str
    detail: str = ""  # a sentence for people
    heard_unix_s: float = 0.0  # the last sign of life of what was missing: training stood still from about then
    noticed_unix_s: float = 0.0  # a rank was missing from the reports
    opened_unix_s: float = 0.0  # every rank of the next world waited in restore()
    decided_unix_s: float = 0.0
    released_unix_s: float = 0.0  # every host had recorded the decision: the ranks went on
    new_attempt: int = 0  # 0: no world goes on yet
    outcome: str = ""  # of the decision: EXACT, EXACT_OLDER, NONE
    source: str = ""  # the farthest place a shard came from: memory, peer, rebuild, persisted; none: from scratch
    newest_step: int = 0  # the newest step that a rank is known to have completed in the history that ended
    base_step: int = 0  # the step that was restored
    step_s: float = 0.0  # measured seconds per step in the history that ended
    blocked_s: float = 0.0  # what snapshots cost its slowest rank, as the trainers said
    first_step: int = 0  # the first step seen of the new history
    first_step_unix_s: float = 0.0
    has_storage: bool = False  # durable storage was configured
    persisted_step: int = 0  # the newest step of the live history on it when the decision was made


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger:
    """The interruptions of a run, oldest first, bounded; what was dropped is summed up in ``earlier_...``.

    ``is_whole``: it goes back to the run's first step. ``began_unix_s``: since when it is kept.
    """

    began_unix_s: float = 0.0
    is_whole: bool = False
    entries: tuple[Interruption, ...] = ()
    earlier_count: int = 0
    earlier_steps_lost: int = 0
    earlier_down_s: float = 0.0
    earlier_recompute_s: float = 0.0
    earlier_blocked_s: float = 0.0
