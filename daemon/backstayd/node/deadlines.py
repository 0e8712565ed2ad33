"""How long jobs on bytes may take before they count as stuck."""

from __future__ import annotations

from typing import Final

FLOOR_BYTES_PER_S: Final = 20_000_000  # slower than this and a transfer counts as stuck
BASE_DEADLINE_S: Final = 30.0
STORAGE_FLOOR_BYTES_PER_S: Final = 5_000_000  # slower than this and a store counts as stuck
STORAGE_DEADLINE_S: Final = 60.0


def deadline_s(size_bytes: int) -> float:
    """For moving ``size_bytes`` between nodes or through memory."""
    return BASE_DEADLINE_S + size_bytes / FLOOR_BYTES_PER_S


def storage_deadline_s(size_bytes: int) -> float:
    """For reading ``size_bytes`` from durable storage."""
    return STORAGE_DEADLINE_S + size_bytes / STORAGE_FLOOR_BYTES_PER_S
