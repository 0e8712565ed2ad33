"""Files that daemons own: listed while they are renamed and removed, damaged in place, on file systems of their own."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


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


@contextmanager
def mounted_tmpfs(path: Path, options: str) -> Iterator[Path]:
    """A file system of its own at ``path``, which is made; the test is skipped where nothing can be mounted."""
    path.mkdir()
    argv = ["mount", "-t", "tmpfs", "-o", options, "backstay-test", str(path)]
    mounted = subprocess.run(argv, capture_output=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount here: {mounted.stderr.decode().strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=False, capture_output=True)


def remount(path: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(path)], check=True)


def flip_byte(path: Path, offset: int | None = None) -> None:
    """Invert every bit of one byte of the same file, as a fault of memory or disk may; by default in its middle."""
    with path.open("r+b") as file:
        at = path.stat().st_size // 2 if offset is None else offset
        (byte,) = os.pread(file.fileno(), 1, at)
        os.pwrite(file.fileno(), bytes([byte ^ 0xFF]), at)
