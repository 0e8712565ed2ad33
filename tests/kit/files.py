"""Files that daemons own: listed while they are renamed and removed, and damaged in place."""

from __future__ import annotations

import os
from pathlib import Path


def files_in(directory: Path, pattern: str = "*") -> dict[Path, os.stat_result]:
    """Each file under ``directory`` whose path's end matches ``pattern``, in order, and what it was when it was seen."""
    found: dict[Path, os.stat_result] = {}
    for folder, _folders, names in os.walk(directory):
        for path in (Path(folder, name) for name in names):
            try:
                if path.match(pattern):
                    found[path] = path.stat()
            except FileNotFoundError:  # renamed or removed since it was listed
                continue
    return dict(sorted(found.items()))


def flip_byte(path: Path, offset: int | None = None) -> None:
    """Invert every bit of one byte of the same file, as a fault of memory or disk may; by default in its middle."""
    with path.open("r+b") as file:
        at = path.stat().st_size // 2 if offset is None else offset
        (byte,) = os.pread(file.fileno(), 1, at)
        os.pwrite(file.fileno(), bytes([byte ^ 0xFF]), at)
