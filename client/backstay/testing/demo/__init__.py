"""``make demo``: a training run loses trainers, daemons and nodes, and must end bitwise equal to an undisturbed run.

Run as ``python -m backstay.testing.demo [flags]`` or through :func:`main`.
"""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit status: 0 = bitwise equal, 1 = not, or lost for good, 64 = wrong flags."""
    from backstay.testing.demo.harness import run

    return run(argv)


__all__ = ["main"]
