"""The operator's settings as the core sees them, and the numbers that follow from them. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class CorePolicy:
    """Settings of all runs."""

    parity: int | None = None  # None: by size of the job, 2 from six nodes on, 1 from two, 0 with one
    group_size: int = 8
    keep: int = 1
    lease_s: float = 3.0
    job_ttl_s: float = 86400.0  # after which a run without trainers is forgotten; 0: never
    probation_steps: int = 3
    restore_loop_limit: int = 10  # restores of one snapshot without progress, then the run stops; 0: no limit
    persist_url: str = ""  # "" = no durable storage
    persist_every_s: float = 0.0  # 0: not by time
    persist_every_steps: int = 0  # 0: not by steps
    persist_keep_last: int = 3
    persist_keep_every: int = 0  # besides, every n-th is kept for good; 0: none
    persist_bandwidth_bytes_per_s: int = 0  # per node; 0: no cap

    def wanted_parity(self, node_count: int) -> int:
        """Parity fragments per stripe for a job on ``node_count`` nodes."""
        if self.parity is not None:
            return self.parity
        if node_count >= 6:
            return 2
        return 1 if node_count >= 2 else 0
