"""`backstay demo`: hands over to ``backstay.testing.demo``, which needs torch; nothing else of the daemon does."""

from __future__ import annotations

from collections.abc import Sequence

from backstayd.cli.handover import run_testing


def run(argv: Sequence[str]) -> int:
    return run_testing("backstay.testing.demo", argv)
