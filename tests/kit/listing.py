"""Listing files while a daemon renames and removes them. Must not fail because something went in the middle of it."""

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
