"""`make bench`: what snapshots cost, how fast state is protected and comes back, beside the limits of the machine.

Runs real daemons and real trainers, taking turns with memcpy, raw TCP and torch.distributed.checkpoint in the same rounds. Bars
are reported, never asserted. ``docs/benchmarks.md`` says what each figure means.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str]) -> int:
    """Run the benchmark; exit status 0 when it ran, 1 when a measurement failed."""
    from bench.run import run

    return run(argv)
