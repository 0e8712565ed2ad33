"""What the operator chose, as the core sees it, and the numbers that follow from it. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class CorePolicy:
    """``parity`` None means by size of the job: 2 from six nodes on, 1 from two, 0 with one."""

    parity: int | None = None
    group_size: int = 8
    keep: int = 1
    lease_s: float = 3.0
    job_ttl_s: float = 86400.0  # a run without trainers is forgotten after so long; 0: never

    def wanted_parity(self, node_count: int) -> int:
        """Parity fragments per stripe for a job on ``node_count`` nodes."""
        if self.parity is not None:
            return self.parity
        if node_count >= 6:
            return 2
        return 1 if node_count >= 2 else 0
